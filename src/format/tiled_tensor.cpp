#include "hqq/tiled_tensor.hpp"

#include <string_view>

#include "hqq/device.hpp"
#include "hqq/error.hpp"
#include "src/cpu/linear/tiles/tile_order.hpp"
#include "src/cpu/parallel.hpp"
#include "src/format/tensor_specs.hpp"

namespace hqq {
namespace {

using cpu::TileOrder;

int threads_of(const TileOptions& options) {
  return options.threads > 0 ? options.threads : default_threads();
}

// What tiles share with format 1: all but the codes, scale and zero, which come first.
void share_metadata(const PackedMatrix& from, PackedMatrix& to) {
  to.config = from.config;
  to.out_features = from.out_features;
  to.in_features = from.in_features;
  constexpr std::size_t kReordered = 3;
  static_assert(kTensorNames[kReordered] == std::string_view("scale_step"));
  const auto given = from.fields();
  const auto taken = to.fields();
  for (std::size_t i = kReordered; i < given.size(); ++i) *taken[i].second = *given[i].second;
}

std::string describe(const LayerConfig& config, std::int64_t out, std::int64_t in) {
  return "W is " + shape_string({out, in}) + ", group_size " +
         (config.group_size ? std::to_string(*config.group_size) : "None") + ", axis " +
         std::to_string(config.axis);
}

}  // namespace

bool can_tile(const LayerConfig& config, std::int64_t out_features, std::int64_t in_features) {
  if (config.axis == 1) return out_features > 0 && in_features > 0;
  const std::int64_t group = config.group_size.value_or(out_features);
  return group > 0 && group % TiledTensor::kTileRows == 0 && out_features % group == 0;
}

TensorSpecs TiledTensor::specs() const {
  TensorSpecs specs = tensor_specs(config, out_features, in_features);
  const TileOrder order(config, layout());
  specs[0].shape = {order.tiles(), order.units(), order.bits() * cpu::kFieldBytes};
  if (config.axis == 1) {
    specs[1].shape = specs[2].shape = {order.tiles(), order.groups(), kTileRows};
  }
  return specs;
}

void TiledTensor::allocate() { allocate_tensors(*this, specs()); }

void TiledTensor::validate(const std::string& name) const {
  if (out_features <= 0 || in_features <= 0 || !can_tile(config, out_features, in_features)) {
    throw_format(name, "no tiles have this shape: " + describe(config, out_features, in_features));
  }
  check_tensors(*this, specs(), name, "the tiled ");
}

TiledTensor tile(QuantizedTensor q, const TileOptions& options) {
  q.validate("tile");
  if (!can_tile(q.config, q.out_features, q.in_features)) {
    throw_invalid("tile",
                  "axis 0 has tiles when group_size is a multiple of 16 that divides "
                  "out_features; " +
                      describe(q.config, q.out_features, q.in_features));
  }
  TiledTensor tiled;
  share_metadata(q, tiled);
  tiled.allocate();
  share_metadata(q, tiled);
  const TileOrder order(q.config, q.layout());
  const auto metadata_bytes = [&](const Tensor& t) {
    return static_cast<std::size_t>(order.groups() * TiledTensor::kTileRows) * dtype_size(t.dtype);
  };
  cpu::parallel_for(order.tiles(), threads_of(options), [&](std::int64_t t) {
    cpu::pack_tile(q, order, t, tiled.W_q.data<std::uint8_t>() + t * order.tile_bytes());
    if (q.config.axis == 0) return;
    for (const auto& [from, to] : {std::pair(&q.scale, &tiled.scale), {&q.zero, &tiled.zero}}) {
      cpu::pack_metadata(*from, order, t,
                         to->buffer.data + static_cast<std::size_t>(t) * metadata_bytes(*from));
    }
  });
  if (q.config.axis == 0) {
    tiled.scale = std::move(q.scale);
    tiled.zero = std::move(q.zero);
  }
  return tiled;
}

QuantizedTensor untile(const TiledTensor& tiled, const TileOptions& options) {
  tiled.validate("untile");
  QuantizedTensor q;
  share_metadata(tiled, q);
  q.allocate();
  share_metadata(tiled, q);
  const TileOrder order(q.config, q.layout());
  cpu::parallel_for(order.tiles(), threads_of(options), [&](std::int64_t t) {
    cpu::unpack_tile(tiled.W_q.data<std::uint8_t>() + t * order.tile_bytes(), order, t, q);
    if (q.config.axis == 0) return;
    for (const auto& [from, to] : {std::pair(&tiled.scale, &q.scale), {&tiled.zero, &q.zero}}) {
      const auto bytes = static_cast<std::size_t>(order.groups() * TiledTensor::kTileRows) *
                         dtype_size(from->dtype);
      cpu::unpack_metadata(from->buffer.data + static_cast<std::size_t>(t) * bytes, order, t, *to);
    }
  });
  if (q.config.axis == 0) {
    q.scale = tiled.scale;
    q.zero = tiled.zero;
  }
  return q;
}

}  // namespace hqq
