#include "src/io/float_values.hpp"

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
      throw_invalid("tensor", std::string(dtype_name(dtype)) + " is not a type of weights");
  }
}

}  // namespace

void read_values(DType dtype, const std::byte* in, std::span<float> out) {
  read_as(dtype, in, out);
}
void read_values(DType dtype, const std::byte* in, std::span<double> out) {
  read_as(dtype, in, out);
}

}  // namespace hqq
