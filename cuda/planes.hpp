// Bit widths as template arguments.
#pragma once

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

// Calls fn(PlanesOf<...>{}) for the planes of a width.
template <class Fn>
void dispatch_planes(BitWidth width, const Fn& fn) {
  switch (width) {
    case BitWidth::k8:
      return fn(PlanesOf<Planes{8, 0}>{});
    case BitWidth::k6:
      return fn(PlanesOf<Planes{4, 2}>{});
    case BitWidth::k5:
      return fn(PlanesOf<Planes{4, 1}>{});
    case BitWidth::k4:
      return fn(PlanesOf<Planes{4, 0}>{});
    case BitWidth::k3:
      return fn(PlanesOf<Planes{2, 1}>{});
    case BitWidth::k2:
      return fn(PlanesOf<Planes{2, 0}>{});
    case BitWidth::kTernary:
      return fn(PlanesOf<Planes{0, 0}>{});
    case BitWidth::k1:
      return fn(PlanesOf<Planes{1, 0}>{});
  }
  throw Failure(Status::kUnsupported, "there is no kernel for bit width number " +
                                          std::to_string(static_cast<int>(width)));
}

}  // namespace hqq::cuda
