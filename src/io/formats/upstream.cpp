#include "src/io/formats/upstream.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "hqq/core/group.hpp"
#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/format/float_values.hpp"
#include "src/format/metadata.hpp"
#include "src/io/formats/upstream_pack.hpp"
#include "src/io/formats/upstream_parts.hpp"

namespace hqq {
namespace {

using upstream::grid_of;
using upstream::torch_name;
using upstream::where_of;

// Upstream no longer stores 8-bit metadata: such a layer is written as float32.
DType stored_meta_dtype(const LayerConfig& config) {
  return config.quant_scale || config.quant_zero ? DType::kF32 : config.meta_dtype;
}

DType compute_dtype_of(const LayerConfig& config, const UpstreamOptions& options,
                       const std::string& name) {
  const DType dtype = options.compute_dtype.value_or(stored_meta_dtype(config));
  if (!upstream::is_meta_dtype(dtype)) {
    throw_invalid(where_of(name), "compute_dtype is " + std::string(dtype_name(dtype)) +
                                      "; it must be float16, bfloat16 or float32");
  }
  return dtype;
}

Tensor scalar(DType dtype, const void* value) {
  Tensor tensor = Tensor::allocate(dtype, {});
  std::memcpy(tensor.buffer.data, value, tensor.nbytes());
  return tensor;
}

Tensor integer(std::int64_t value) {
  const auto small = static_cast<std::int32_t>(value);
  return scalar(DType::kI32, &small);
}

Tensor boolean(bool value) {
  const std::uint8_t byte = value ? 1 : 0;
  return scalar(DType::kU8, &byte);
}

// One character code an element.
Tensor text(const std::string& value) {
  Tensor tensor = Tensor::allocate(DType::kU8, {static_cast<std::int64_t>(value.size())});
  std::memcpy(tensor.buffer.data, value.data(), value.size());
  return tensor;
}

Tensor nbits_tensor(BitWidth width) {
  if (width != BitWidth::kTernary) return integer(static_cast<std::int64_t>(nbits_of(width)));
  const auto value = static_cast<float>(nbits_of(width));
  return scalar(DType::kF32, &value);
}

Tensor shape_tensor(std::int64_t out_features, std::int64_t in_features) {
  Tensor tensor = Tensor::allocate(DType::kI64, {2});
  tensor.data<std::int64_t>()[0] = out_features;
  tensor.data<std::int64_t>()[1] = in_features;
  return tensor;
}

}  // namespace

namespace upstream {

std::string where_of(const std::string& name) { return "upstream, layer " + quote_text(name); }

Grid grid_of(int axis, std::int64_t group_size, std::int64_t groups) {
  return axis == 1 ? Grid{groups, group_size} : Grid{group_size, groups};
}

std::vector<std::int64_t> metadata_shape(int axis, std::int64_t groups) {
  if (axis == 1) return {groups, 1};
  return {1, groups};
}

bool is_meta_dtype(DType dtype) {
  return dtype == DType::kF16 || dtype == DType::kBF16 || dtype == DType::kF32;
}

std::string torch_name(DType dtype) { return "torch." + std::string(dtype_name(dtype)); }

TensorInfo packed_info(const LayerConfig& config, Grid grid, DType compute_dtype,
                       bool view_as_float, const std::string& name) {
  const UpstreamPacking& packing = upstream_packing(config.nbits);
  TensorInfo info{"W_q", packing.word, {packing.packed_rows(grid.rows), grid.cols}, 0, 0};
  if (!view_as_float) return info;
  const auto bytes = grid.cols * static_cast<std::int64_t>(dtype_size(packing.word));
  const auto size = static_cast<std::int64_t>(dtype_size(compute_dtype));
  if (bytes % size != 0) {
    throw_invalid(where_of(name), "view_as_float: rows of W_q have " + std::to_string(bytes) +
                                      " bytes, which are not whole " +
                                      std::string(dtype_name(compute_dtype)) + " values");
  }
  info.dtype = compute_dtype;
  info.shape[1] = bytes / size;
  return info;
}

}  // namespace upstream

const std::vector<std::string>& upstream_keys() {
  static const std::vector<std::string> keys = {// clang-format off
      "W_q", "nbits", "group_size", "shape", "scale", "zero", "axis", "packing",
      "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "bias",
      "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize",
      "round_zero"};
  // clang-format on
  return keys;
}

void check_upstream_holds(const LayerConfig& config, std::int64_t out_features,
                          std::int64_t in_features, const std::string& name) {
  const std::string where = where_of(name);
  if (config.balance == Balance::kSinkhorn) {
    throw_invalid(where, "hqq has no place for col_scale; quantize with balance none");
  }
  const core::GroupLayout layout = group_layout(config, out_features, in_features);
  const std::int64_t group_size = layout.group_size;
  const std::string form = " (W is " + shape_string({out_features, in_features}) + ", axis " +
                           std::to_string(config.axis) + ")";
  const bool tails =
      config.axis == 1 ? in_features % group_size != 0 : layout.numel() % group_size != 0;
  if (tails) {
    throw_invalid(where, "hqq has no short last groups; group_size " + std::to_string(group_size) +
                             " must divide " +
                             std::to_string(config.axis == 1 ? in_features : layout.numel()) +
                             form);
  }
  const UpstreamPacking& packing = upstream_packing(config.nbits);
  const upstream::Grid grid = grid_of(config.axis, group_size, layout.num_groups());
  if (!packing.pads() && grid.rows % packing.fields != 0) {
    throw_invalid(where, std::string("hqq packs ") + packing.name + " in " +
                             std::to_string(packing.fields) + " equal parts, but the " +
                             std::to_string(grid.rows) +
                             (config.axis == 1 ? " groups" : " weights of a group") +
                             " do not divide by it" + form);
  }
  if (group_size > std::numeric_limits<std::int32_t>::max()) {
    throw_invalid(where, "group_size " + std::to_string(group_size) + " does not fit hqq's int32");
  }
}

std::vector<std::pair<std::string, Tensor>> upstream_layout(const LayerConfig& config,
                                                            std::int64_t out_features,
                                                            std::int64_t in_features,
                                                            const std::string& name,
                                                            const UpstreamOptions& options) {
  check_upstream_holds(config, out_features, in_features, name);
  const std::int64_t group_size = group_layout(config, out_features, in_features).group_size;
  const std::int64_t groups = out_features * in_features / group_size;
  const DType compute = compute_dtype_of(config, options, name);
  const UpstreamPacking& packing = upstream_packing(config.nbits);
  const TensorInfo packed = upstream::packed_info(config, grid_of(config.axis, group_size, groups),
                                                  compute, options.view_as_float, name);
  const std::vector<std::int64_t> metadata_shape = upstream::metadata_shape(config.axis, groups);
  const DType meta = stored_meta_dtype(config);
  return {{"W_q", {packed.dtype, packed.shape, {}}},
          {"nbits", nbits_tensor(config.nbits)},
          {"group_size", integer(group_size)},
          {"shape", shape_tensor(out_features, in_features)},
          {"scale", {meta, metadata_shape, {}}},
          {"zero", {meta, metadata_shape, {}}},
          {"axis", integer(config.axis)},
          {"packing", text(packing.name)},
          {"unpack_view_dtype", text(torch_name(packing.word))},
          {"view_as_float", boolean(options.view_as_float)},
          {"quant_scale", boolean(false)},
          {"quant_zero", boolean(false)},
          {"compute_dtype", text(torch_name(compute))},
          {"offload_meta", boolean(false)},
          {"encoded_state_dict", boolean(true)},
          {"stores_quant_config", boolean(true)},
          {"channel_wise", boolean(true)},
          {"optimize", boolean(config.solver != Solver::kMinMax)},
          {"round_zero", boolean(config.effective_round_zero())}};
}

void fill_upstream_metadata(const Tensor& stored, const Tensor& step, const Tensor& offset,
                            Tensor& out) {
  out = Tensor::allocate(out.dtype, out.shape);
  if (stored.dtype == out.dtype) {
    std::memcpy(out.buffer.data, stored.buffer.data, out.nbytes());
  } else {
    write_values(read_metadata(stored, step, offset), out.dtype, out.buffer.data);
  }
}

std::vector<std::pair<std::string, Tensor>> to_upstream(const QuantizedTensor& q,
                                                        const std::string& name,
                                                        const UpstreamOptions& options) {
  q.validate(name);
  auto tensors = upstream_layout(q.config, q.out_features, q.in_features, name, options);
  for (auto& [key, tensor] : tensors) {
    if (key == "W_q") {
      tensor = Tensor::allocate(tensor.dtype, tensor.shape);
      pack_upstream(q.config.nbits, q.W_q, q.in_features, tensor);
    } else if (key == "scale") {
      fill_upstream_metadata(q.scale, q.scale_step, q.scale_offset, tensor);
    } else if (key == "zero") {
      fill_upstream_metadata(q.zero, q.zero_step, q.zero_offset, tensor);
    }
  }
  return tensors;
}

}  // namespace hqq
