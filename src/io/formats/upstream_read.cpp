// Reading one layer of upstream's layout: everything in it may come from a hostile file.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>

#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/io/formats/upstream_pack.hpp"
#include "src/io/formats/upstream_parts.hpp"

namespace hqq {
namespace {

using Tensors = std::map<std::string, Tensor>;
using upstream::Grid;

const Tensor* find(const Tensors& tensors, const std::string& key) {
  const auto found = tensors.find(key);
  return found == tensors.end() ? nullptr : &found->second;
}

const Tensor& require(const Tensors& tensors, std::string_view key, const std::string& where) {
  const Tensor* tensor = find(tensors, std::string(key));
  if (tensor == nullptr) throw_format(where, "tensor " + std::string(key) + " is missing");
  return *tensor;
}

std::string form_of(const Tensor& tensor) {
  return std::string(safetensors_name(tensor.dtype)) + " " + shape_string(tensor.shape);
}

// Copies the single element, whatever its alignment.
template <class T>
T element(const Tensor& tensor) {
  T value;
  std::memcpy(&value, tensor.buffer.data, sizeof(T));
  return value;
}

double read_number(const Tensor& tensor, const std::string& key, const std::string& where) {
  if (tensor.numel() == 1) {
    switch (tensor.dtype) {
      case DType::kI32:
        return element<std::int32_t>(tensor);
      case DType::kI64:
        return static_cast<double>(element<std::int64_t>(tensor));
      case DType::kU8:
        return element<std::uint8_t>(tensor);
      case DType::kF32:
        return element<float>(tensor);
      case DType::kF64:
        return element<double>(tensor);
      default:
        break;
    }
  }
  throw_format(where, key + " is " + form_of(tensor) + "; it must be one number, I32 []");
}

std::int64_t read_integer(const Tensors& tensors, const std::string& key,
                          const std::string& where) {
  const double value = read_number(require(tensors, key, where), key, where);
  constexpr double kLimit = 9007199254740992.0;  // 2^53: every integer up to it is a double
  if (!(std::abs(value) <= kLimit) || value != std::floor(value)) {
    throw_format(where, key + " must be an integer");
  }
  return static_cast<std::int64_t>(value);
}

bool read_flag(const Tensors& tensors, const std::string& key, bool missing,
               const std::string& where) {
  const Tensor* tensor = find(tensors, key);
  if (tensor == nullptr) return missing;
  const bool is_flag = tensor->numel() == 1 &&
                       (tensor->dtype == DType::kU8 || tensor->dtype == DType::kBool) &&
                       element<std::uint8_t>(*tensor) <= 1;
  if (!is_flag) throw_format(where, key + " must be U8 [] with the value 0 or 1");
  return element<std::uint8_t>(*tensor) == 1;
}

std::string read_text(const Tensor& tensor, const std::string& key, const std::string& where) {
  constexpr std::int64_t kLongest = 64;
  if (tensor.dtype != DType::kU8 || tensor.shape.size() != 1 || tensor.numel() > kLongest) {
    throw_format(where, key + " is " + form_of(tensor) +
                            "; it must be U8 [n], the codes of up to 64 characters");
  }
  return {reinterpret_cast<const char*>(tensor.buffer.data), tensor.nbytes()};
}

void read_shape(const Tensors& tensors, const std::string& where, UpstreamLayer& layer) {
  const Tensor& tensor = require(tensors, "shape", where);
  if (tensor.dtype != DType::kI64 || tensor.shape != std::vector<std::int64_t>{2}) {
    throw_format(where, "shape is " + form_of(tensor) + "; it must be I64 [2]");
  }
  std::int64_t sizes[2];
  std::memcpy(sizes, tensor.buffer.data, sizeof(sizes));
  constexpr std::int64_t kMostWeights = std::int64_t{1} << 56;
  if (sizes[0] < 1 || sizes[1] < 1 || sizes[0] > kMostWeights / sizes[1]) {
    throw_format(where, "shape is " + shape_string({sizes[0], sizes[1]}) +
                            "; both sizes must be positive, with at most 2^56 weights");
  }
  layer.out_features = sizes[0];
  layer.in_features = sizes[1];
}

// nbits and packing belong together. hqq itself reads 1.58 back as 1, so 1 with the 2-bit packing
// is a ternary layer that was loaded and saved again.
BitWidth read_width(const Tensors& tensors, const std::string& where) {
  const double nbits = read_number(require(tensors, "nbits", where), "nbits", where);
  const auto width = bit_width_from_nbits(nbits);
  if (!width) throw_format(where, "nbits must be one of " + supported_nbits());
  const Tensor* packing_text = find(tensors, "packing");
  if (packing_text == nullptr) return *width;
  const std::string packing_name = read_text(*packing_text, "packing", where);
  const UpstreamPacking* packing = find_upstream_packing(packing_name);
  if (packing == nullptr) {
    throw_format(where, "there is no packing " + quote_text(packing_name) +
                            "; it must be 8bit_u8, 4bit_u8, 3bit_32, 2bit_u8 or 1bit_u8");
  }
  if (*width == BitWidth::k1 && packing == &upstream_packing(BitWidth::kTernary)) {
    return BitWidth::kTernary;
  }
  if (packing != &upstream_packing(*width)) {
    throw_format(where, "packing is " + packing_name +
                            ", which does not go with nbits; it must be " +
                            upstream_packing(*width).name);
  }
  return *width;
}

void read_groups(const Tensors& tensors, const std::string& where, UpstreamLayer& layer) {
  const std::int64_t axis = read_integer(tensors, "axis", where);
  if (axis != 0 && axis != 1) {
    throw_format(where, "axis is " + std::to_string(axis) + "; it must be 0 or 1");
  }
  layer.config.axis = static_cast<int>(axis);
  layer.config.group_size = std::nullopt;
  const std::int64_t whole = axis == 1 ? layer.in_features : layer.out_features;
  // state_dict() cannot store the None of a direct call of the quantizer.
  if (find(tensors, "group_size") == nullptr) return;
  const std::int64_t group_size = read_integer(tensors, "group_size", where);
  const std::int64_t numel = layer.out_features * layer.in_features;
  if (group_size < 1 || numel % group_size != 0) {
    throw_format(where, "group_size is " + std::to_string(group_size) + "; it must divide the " +
                            std::to_string(numel) + " weights of the layer");
  }
  if (axis == 1 && layer.in_features % group_size != 0) {
    throw_invalid(where, "groups of " + std::to_string(group_size) +
                             " weights run over the ends of rows of " +
                             std::to_string(layer.in_features) +
                             "; format 1 needs rows of whole groups");
  }
  if (group_size % 8 == 0) {
    layer.config.group_size = group_size;
  } else if (group_size != whole) {
    throw_invalid(where, "group_size is " + std::to_string(group_size) +
                             "; format 1 needs a multiple of 8, or " + std::to_string(whole) +
                             ", one group per " + (axis == 1 ? "row" : "column"));
  }
}

// Settings that change how the numbers are read, and that hqq only ever writes in one way.
void read_flags(const Tensors& tensors, const std::string& where, UpstreamLayer& layer) {
  if (read_flag(tensors, "quant_scale", false, where) ||
      read_flag(tensors, "quant_zero", false, where)) {
    throw_invalid(
        where,
        "quant_scale or quant_zero is true; hqq 0.2.8 does not write such layers and only "
        "plain scales and zeros can be read");
  }
  if (!read_flag(tensors, "channel_wise", true, where)) {
    throw_invalid(where,
                  "channel_wise is false (one scale for the whole matrix); format 1 needs groups");
  }
  if (!read_flag(tensors, "encoded_state_dict", true, where)) {
    throw_format(where, "encoded_state_dict is 0; it must be 1 in a safetensors file");
  }
  read_flag(tensors, "offload_meta", false, where);
  read_flag(tensors, "stores_quant_config", false, where);
  const bool optimize = read_flag(tensors, "optimize", true, where);
  layer.config.solver = optimize ? Solver::kHqq : Solver::kMinMax;
  if (find(tensors, "round_zero") != nullptr) {
    layer.config.round_zero = read_flag(tensors, "round_zero", false, where);
  }
  layer.options.view_as_float = read_flag(tensors, "view_as_float", false, where);
  if (const Tensor* dtype = find(tensors, "compute_dtype")) {
    const std::string name = read_text(*dtype, "compute_dtype", where);
    const auto parsed = name.starts_with("torch.") ? dtype_from_name(name.substr(6)) : std::nullopt;
    if (!parsed || !upstream::is_meta_dtype(*parsed)) {
      throw_format(where, "compute_dtype is " + quote_text(name) +
                              "; it must be torch.float16, torch.bfloat16 or torch.float32");
    }
    layer.options.compute_dtype = *parsed;
  }
  if (const Tensor* dtype = find(tensors, "unpack_view_dtype")) {
    const std::string name = read_text(*dtype, "unpack_view_dtype", where);
    const std::string right = upstream::torch_name(upstream_packing(layer.config.nbits).word);
    if (name != right) {
      throw_format(where, "unpack_view_dtype is " + quote_text(name) + "; it must be " + right);
    }
  }
}

void check_packed(const Tensors& tensors, Grid grid, const std::string& name,
                  UpstreamLayer& layer) {
  const std::string where = upstream::where_of(name);
  const Tensor& packed = require(tensors, "W_q", where);
  if (layer.options.view_as_float) {
    if (!upstream::is_meta_dtype(packed.dtype)) {
      throw_format(
          where, "W_q is " + form_of(packed) + "; with view_as_float it must be F16, BF16 or F32");
    }
    // The view is made before any other dtype can be set, so W_q itself knows best.
    layer.options.compute_dtype = packed.dtype;
  }
  const TensorInfo right =
      upstream::packed_info(layer.config, grid, packed.dtype, layer.options.view_as_float, name);
  if (packed.dtype != right.dtype || packed.shape != right.shape) {
    throw_format(where, "W_q is " + form_of(packed) + "; the other tensors of the layer need " +
                            std::string(safetensors_name(right.dtype)) + " " +
                            shape_string(right.shape));
  }
}

void check_metadata(const Tensors& tensors, std::int64_t groups, const std::string& where,
                    UpstreamLayer& layer) {
  std::vector<std::int64_t> shape = upstream::metadata_shape(layer.config.axis, groups);
  layer.zero_scale = find(tensors, "zero_scale") != nullptr;
  if (layer.zero_scale) shape.insert(shape.begin(), 2);
  const std::vector<std::string> keys = layer.zero_scale
                                            ? std::vector<std::string>{"zero_scale"}
                                            : std::vector<std::string>{"scale", "zero"};
  layer.config.meta_dtype = require(tensors, keys[0], where).dtype;
  for (const std::string& key : keys) {
    const Tensor& tensor = require(tensors, key, where);
    if (!upstream::is_meta_dtype(tensor.dtype) || tensor.shape != shape) {
      throw_format(where, key + " is " + form_of(tensor) + "; it must be F16, BF16 or F32 " +
                              shape_string(shape));
    }
    if (tensor.dtype != layer.config.meta_dtype) {
      throw_format(where, "scale and zero must have the same type");
    }
  }
}

}  // namespace

UpstreamLayer parse_upstream(const Tensors& tensors, const std::string& name) {
  const std::string where = upstream::where_of(name);
  for (const auto& [key, tensor] : tensors) {
    const auto& known = upstream_keys();
    if (key != "zero_scale" && std::find(known.begin(), known.end(), key) == known.end()) {
      throw_format(where, "hqq has no tensor " + quote_text(key));
    }
  }
  UpstreamLayer layer;
  layer.config.balance = Balance::kNone;
  read_shape(tensors, where, layer);
  layer.config.nbits = read_width(tensors, where);
  read_groups(tensors, where, layer);
  read_flags(tensors, where, layer);
  const std::int64_t group_size =
      group_layout(layer.config, layer.out_features, layer.in_features).group_size;
  check_upstream_holds(layer.config, layer.out_features, layer.in_features, name);
  const std::int64_t groups = layer.out_features * layer.in_features / group_size;
  check_packed(tensors, upstream::grid_of(layer.config.axis, group_size, groups), name, layer);
  check_metadata(tensors, groups, where, layer);
  return layer;
}

QuantizedTensor from_upstream(const Tensors& tensors, const std::string& name) {
  const UpstreamLayer layer = parse_upstream(tensors, name);
  QuantizedTensor q;
  q.config = layer.config;
  q.out_features = layer.out_features;
  q.in_features = layer.in_features;
  q.allocate();
  unpack_upstream(q.config.nbits, tensors.at("W_q"), q.in_features, q.W_q,
                  upstream::where_of(name));
  const std::size_t bytes = q.scale.nbytes();
  if (layer.zero_scale) {
    const std::byte* stacked = tensors.at("zero_scale").buffer.data;
    std::memcpy(q.zero.buffer.data, stacked, bytes);
    std::memcpy(q.scale.buffer.data, stacked + bytes, bytes);
  } else {
    std::memcpy(q.scale.buffer.data, tensors.at("scale").buffer.data, bytes);
    std::memcpy(q.zero.buffer.data, tensors.at("zero").buffer.data, bytes);
  }
  q.validate(name);
  return q;
}

}  // namespace hqq
