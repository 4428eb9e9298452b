// The library is made of the objects of hqq_cuda_emulated.
