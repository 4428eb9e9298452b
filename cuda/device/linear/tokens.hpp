// Which rows of x an expert multiplies, and their column scales.
#pragma once

#include <cstdint>

#include "cuda/device/format/metadata.hpp"
#include "cuda/device/linear/params.hpp"

namespace hqq::cuda::device {

struct Tokens {
  std::int64_t begin, end;
};
__device__ inline Tokens tokens_of(const LinearParams& p, int expert) {
  if (p.row_begin == nullptr) return {0, p.rows};
  // Counts come from the model: never past the rows there are.
  const std::int64_t begin = ld_global(p.row_begin + expert);
  const std::int64_t end = ld_global(p.row_begin + expert + 1);
  return {begin < 0 ? 0 : begin, end < p.rows ? end : p.rows};
}

__device__ inline const unsigned char* col_scale_of(const LinearParams& p, int expert) {
  return p.col_scale == nullptr ? nullptr : p.col_scale + expert * p.col_scale_stride;
}

}  // namespace hqq::cuda::device
