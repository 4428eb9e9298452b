# HQQ_CUDA: what supplies the namespace hqq::cuda. There are no kernels yet, so src/cuda_stub.cpp does;
# it is part of HQQ_SOURCES and every function in it throws hqq::CudaError.
if(NOT HQQ_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "HQQ_CUDA is \"${HQQ_CUDA}\"; it must be AUTO, ON or OFF")
endif()
if(HQQ_CUDA STREQUAL "ON")
  message(FATAL_ERROR "HQQ_CUDA=ON, but this version has no CUDA kernels; use AUTO or OFF")
endif()
