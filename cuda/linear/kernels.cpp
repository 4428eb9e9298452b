#include "cuda/linear/kernels.hpp"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <utility>

#include "cuda/device/format/tile.hpp"

namespace hqq::cuda {
namespace {

using device::tile_planes;
using device::TilePlanes;

// What kernels_*.cu have.
constexpr TilePlanes kPlanes[] = {{8, 0}, {4, 2}, {4, 1}, {4, 0}, {2, 1}, {2, 0}, {1, 0}};

constexpr bool has_kernels(BitWidth width) {
  return std::ranges::count(kPlanes, tile_planes(width)) == 1;
}
static_assert(std::ranges::all_of(kAllBitWidths, has_kernels),
              "a bit width has no linear kernels: add its planes above, and a kernels_*.cu");

}  // namespace

void launch_linear(BitWidth width, const LinearLaunch& launch) {
  const TilePlanes planes = tile_planes(width);
  [&]<std::size_t... kIndex>(std::index_sequence<kIndex...>) {
    const auto try_planes = [&]<TilePlanes kThese>() {
      if (kThese == planes) launch_linear<kThese.low, kThese.high>(launch);
    };
    (try_planes.template operator()<kPlanes[kIndex]>(), ...);
  }(std::make_index_sequence<std::size(kPlanes)>{});
}

}  // namespace hqq::cuda
