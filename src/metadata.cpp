#include "src/metadata.hpp"

#include <algorithm>
#include <cmath>

#include "hqq/core/math.hpp"
#include "hqq/error.hpp"

namespace hqq {
namespace {

constexpr std::size_t kBlock = QuantizedTensor::kMetadataBlock;

// 8-bit codes of one block: value = code * step + offset.
void store_block(std::span<const float> values, std::uint8_t* codes, float& step, float& offset,
                 float* read_back) {
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  offset = *low;
  step = (*high - *low) / 255.0f;
  const float inv_step = step > 0.0f ? 1.0f / step : 0.0f;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const float code = std::rint((values[i] - offset) * inv_step);
    codes[i] = static_cast<std::uint8_t>(std::clamp(code, 0.0f, 255.0f));
    read_back[i] = static_cast<float>(codes[i]) * step + offset;
  }
}

}  // namespace

std::vector<float> store_metadata(std::span<const float> values, Tensor& codes, Tensor& step,
                                  Tensor& offset) {
  std::vector<float> stored(values.size());
  if (codes.dtype != DType::kU8) {
    from_f32(values, codes.dtype, codes.buffer.data);
    return to_f32(codes);
  }
  for (std::size_t begin = 0, block = 0; begin < values.size(); begin += kBlock, ++block) {
    const std::size_t count = std::min(kBlock, values.size() - begin);
    store_block(values.subspan(begin, count), codes.data<std::uint8_t>() + begin,
                step.data<float>()[block], offset.data<float>()[block], stored.data() + begin);
  }
  return stored;
}

std::vector<float> read_metadata(const Tensor& codes, const Tensor& step, const Tensor& offset) {
  if (codes.dtype != DType::kU8) return to_f32(codes);
  const auto count = static_cast<std::size_t>(codes.numel());
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>(codes.data<std::uint8_t>()[i]) * step.data<float>()[i / kBlock] +
                offset.data<float>()[i / kBlock];
  }
  return values;
}

std::vector<float> read_scale(const QuantizedTensor& q) {
  return read_metadata(q.scale, q.scale_step, q.scale_offset);
}
std::vector<float> read_zero(const QuantizedTensor& q) {
  return read_metadata(q.zero, q.zero_step, q.zero_offset);
}

std::vector<float> to_f32(const Tensor& tensor) {
  const auto count = static_cast<std::size_t>(tensor.numel());
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) {
    switch (tensor.dtype) {
      case DType::kF16:
        values[i] = core::scalar::f16_bits_to_f32(tensor.data<std::uint16_t>()[i]);
        break;
      case DType::kBF16:
        values[i] = core::scalar::bf16_bits_to_f32(tensor.data<std::uint16_t>()[i]);
        break;
      case DType::kF32:
        values[i] = tensor.data<float>()[i];
        break;
      case DType::kF64:
        values[i] = static_cast<float>(tensor.data<double>()[i]);
        break;
      default:
        throw_invalid("tensor",
                      "dtype " + std::string(dtype_name(tensor.dtype)) + " is not a float type");
    }
  }
  return values;
}

void from_f32(std::span<const float> values, DType dtype, void* out) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    switch (dtype) {
      case DType::kF16:
        static_cast<std::uint16_t*>(out)[i] = core::scalar::f32_to_f16_bits(values[i]);
        break;
      case DType::kBF16:
        static_cast<std::uint16_t*>(out)[i] = core::scalar::f32_to_bf16_bits(values[i]);
        break;
      case DType::kF32:
        static_cast<float*>(out)[i] = values[i];
        break;
      case DType::kF64:
        static_cast<double*>(out)[i] = static_cast<double>(values[i]);
        break;
      default:
        throw_invalid("tensor", "dtype " + std::string(dtype_name(dtype)) + " is not a float type");
    }
  }
}

}  // namespace hqq
