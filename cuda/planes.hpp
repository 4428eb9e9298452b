// Bit widths as template arguments.
#pragma once

#include <cstddef>
#include <iterator>
#include <string>
#include <utility>

#include "cuda/runtime.hpp"
#include "hqq/core/codec.hpp"

namespace hqq::cuda {

// The planes of a RowFormat; low 0: ternary.
struct Planes {
  int low, high;
};
template <Planes kPlanes>
struct PlanesOf {
  static constexpr Planes value = kPlanes;
};

// Kernels read planes of these widths; ternary codes are a case of their own.
constexpr bool is_plane(int bits) {
  return bits == 0 || bits == 1 || bits == 2 || bits == 4 || bits == 8;
}

// Calls fn(PlanesOf<...>{}) for the planes of a width, one instance for each row of kBitWidths.
template <class Fn>
void dispatch_planes(BitWidth width, const Fn& fn) {
  const auto try_width = [&]<std::size_t kIndex>(std::integral_constant<std::size_t, kIndex>) {
    constexpr core::RowFormat kFormat = kBitWidths[kIndex].format;
    static_assert(is_plane(kFormat.low_bits) && is_plane(kFormat.high_bits),
                  "no kernel reads planes of this many bits: cuda/device/format");
    if (static_cast<std::size_t>(width) != kIndex) return false;
    fn(PlanesOf<Planes{kFormat.low_bits, kFormat.high_bits}>{});
    return true;
  };
  const bool found = [&]<std::size_t... kIndex>(std::index_sequence<kIndex...>) {
    return (try_width(std::integral_constant<std::size_t, kIndex>{}) || ...);
  }(std::make_index_sequence<std::size(kBitWidths)>{});
  if (!found) {
    throw Failure(Status::kUnsupported, "there is no kernel for bit width number " +
                                            std::to_string(static_cast<int>(width)));
  }
}

}  // namespace hqq::cuda
