// HQQ_HD marks functions that a CPU and a GPU both run.
#pragma once

#ifdef __CUDACC__
#define HQQ_HD __host__ __device__ __forceinline__
#else
#define HQQ_HD inline
#endif
