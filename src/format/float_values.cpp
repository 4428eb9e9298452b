#include "src/format/float_values.hpp"

#include <cstdint>
#include <cstring>

#include "hqq/core/math.hpp"
#include "hqq/error.hpp"

namespace hqq {
namespace {

template <class Stored, class Out, class Convert>
void convert(const std::byte* in, std::span<Out> out, Convert convert_one) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    // Data in a file need not be aligned.
    Stored stored;
    std::memcpy(&stored, in + i * sizeof(Stored), sizeof(Stored));
    out[i] = static_cast<Out>(convert_one(stored));
  }
}

template <class Stored, class Convert>
void convert_back(std::span<const float> values, std::byte* out, Convert convert_one) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto stored = static_cast<Stored>(convert_one(values[i]));
    std::memcpy(out + i * sizeof(Stored), &stored, sizeof(Stored));
  }
}

[[noreturn]] void refuse(DType dtype) {
  throw_invalid("tensor", std::string(dtype_name(dtype)) + " is not a type of weights");
}

template <class Out>
void read_as(DType dtype, const std::byte* in, std::span<Out> out) {
  const auto same = [](auto x) { return x; };
  switch (dtype) {
    case DType::kF32:
      return convert<float>(in, out, same);
    case DType::kF64:
      return convert<double>(in, out, same);
    case DType::kF16:
      return convert<std::uint16_t>(in, out, core::scalar::f16_bits_to_f32);
    case DType::kBF16:
      return convert<std::uint16_t>(in, out, core::scalar::bf16_bits_to_f32);
    default:
      refuse(dtype);
  }
}

}  // namespace

void read_values(DType dtype, const std::byte* in, std::span<float> out) {
  read_as(dtype, in, out);
}
void read_values(DType dtype, const std::byte* in, std::span<double> out) {
  read_as(dtype, in, out);
}

std::vector<float> read_values(const Tensor& tensor) {
  std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
  read_values(tensor.dtype, tensor.buffer.data, values);
  return values;
}

void write_values(std::span<const float> values, DType dtype, std::byte* out) {
  const auto same = [](float x) { return x; };
  switch (dtype) {
    case DType::kF32:
      return convert_back<float>(values, out, same);
    case DType::kF64:
      return convert_back<double>(values, out, same);
    case DType::kF16:
      return convert_back<std::uint16_t>(values, out, core::scalar::f32_to_f16_bits);
    case DType::kBF16:
      return convert_back<std::uint16_t>(values, out, core::scalar::f32_to_bf16_bits);
    default:
      refuse(dtype);
  }
}

}  // namespace hqq
