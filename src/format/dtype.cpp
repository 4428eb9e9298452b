#include "hqq/dtype.hpp"

#include <array>

namespace hqq {
namespace {

struct DTypeRow {
  DType dtype;
  std::size_t size;
  std::string_view safetensors;
  std::string_view name;
};

constexpr std::array<DTypeRow, 15> kRows = {{
    {DType::kBool, 1, "BOOL", "bool"},
    {DType::kU8, 1, "U8", "uint8"},
    {DType::kI8, 1, "I8", "int8"},
    {DType::kF8E5M2, 1, "F8_E5M2", "float8_e5m2"},
    {DType::kF8E4M3, 1, "F8_E4M3", "float8_e4m3fn"},
    {DType::kI16, 2, "I16", "int16"},
    {DType::kU16, 2, "U16", "uint16"},
    {DType::kF16, 2, "F16", "float16"},
    {DType::kBF16, 2, "BF16", "bfloat16"},
    {DType::kI32, 4, "I32", "int32"},
    {DType::kU32, 4, "U32", "uint32"},
    {DType::kF32, 4, "F32", "float32"},
    {DType::kF64, 8, "F64", "float64"},
    {DType::kI64, 8, "I64", "int64"},
    {DType::kU64, 8, "U64", "uint64"},
}};

// The rows are in the order of the enumeration, so that looking one up is an index.
constexpr const DTypeRow& row(DType dtype) { return kRows[static_cast<std::size_t>(dtype)]; }

constexpr bool rows_in_order() {
  for (std::size_t i = 0; i < kRows.size(); ++i) {
    if (static_cast<std::size_t>(kRows[i].dtype) != i) return false;
  }
  return true;
}
static_assert(rows_in_order());

}  // namespace

std::size_t dtype_size(DType dtype) { return row(dtype).size; }
std::string_view safetensors_name(DType dtype) { return row(dtype).safetensors; }
std::string_view dtype_name(DType dtype) { return row(dtype).name; }

std::optional<DType> dtype_from_safetensors_name(std::string_view name) {
  for (const DTypeRow& r : kRows) {
    if (r.safetensors == name) return r.dtype;
  }
  return std::nullopt;
}

std::optional<DType> dtype_from_name(std::string_view name) {
  for (const DTypeRow& r : kRows) {
    if (r.name == name) return r.dtype;
  }
  return std::nullopt;
}

bool is_weight_dtype(DType dtype) {
  return dtype == DType::kF16 || dtype == DType::kBF16 || dtype == DType::kF32 ||
         dtype == DType::kF64;
}

}  // namespace hqq
