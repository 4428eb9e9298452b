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

void store_metadata(std::span<const float> values, std::size_t begin, Tensor& codes, Tensor& step,
                    Tensor& offset, float* read_back) {
  if (codes.dtype != DType::kU8) {
    std::byte* out = codes.buffer.data + begin * dtype_size(codes.dtype);
    from_f32(values, codes.dtype, out);
    to_f32(out, codes.dtype, {read_back, values.size()});
    return;
  }
  for (std::size_t i = 0; i < values.size(); i += kBlock) {
    const std::size_t count = std::min(kBlock, values.size() - i);
    const std::size_t block = (begin + i) / kBlock;
    store_block(values.subspan(i, count), codes.data<std::uint8_t>() + begin + i,
                step.data<float>()[block], offset.data<float>()[block], read_back + i);
  }
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
  std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
  to_f32(tensor.buffer.data, tensor.dtype, values);
  return values;
}

void to_f32(const void* data, DType dtype, std::span<float> out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    switch (dtype) {
      case DType::kF16:
        out[i] = core::scalar::f16_bits_to_f32(static_cast<const std::uint16_t*>(data)[i]);
        break;
      case DType::kBF16:
        out[i] = core::scalar::bf16_bits_to_f32(static_cast<const std::uint16_t*>(data)[i]);
        break;
      case DType::kF32:
        out[i] = static_cast<const float*>(data)[i];
        break;
      case DType::kF64:
        out[i] = static_cast<float>(static_cast<const double*>(data)[i]);
        break;
      default:
        throw_invalid("tensor", "dtype " + std::string(dtype_name(dtype)) + " is not a float type");
    }
  }
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
