# The CUDA part. Until cuda/ holds kernels, src/cuda_stub.cpp supplies hqq::cuda.
