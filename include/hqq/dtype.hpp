// Element types of tensors, as safetensors names them, and exact scalar conversions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace hqq {

enum class DType : std::uint8_t {
  kBool,
  kU8,
  kI8,
  kF8E5M2,
  kF8E4M3,
  kI16,
  kU16,
  kF16,
  kBF16,
  kI32,
  kU32,
  kF32,
  kF64,
  kI64,
  kU64,
};

// Bytes an element takes.
std::size_t dtype_size(DType dtype);
// "F16", "BF16", ...: the spelling inside safetensors headers.
std::string_view safetensors_name(DType dtype);
// The inverse; nullopt for a name that is not one of the above.
std::optional<DType> dtype_from_safetensors_name(std::string_view name);
// "float16", "bfloat16", ...: the spelling of torch, NumPy and our own JSON.
std::string_view dtype_name(DType dtype);
std::optional<DType> dtype_from_name(std::string_view name);

// True for the types a weight matrix may have: float64, float32, float16, bfloat16.
bool is_weight_dtype(DType dtype);

}  // namespace hqq
