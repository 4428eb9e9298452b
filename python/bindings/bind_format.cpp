// Bit widths and the tensors of a layer: include/hqq/bit_width.hpp and quantized_tensor.hpp.
#include "hqq/bitpack.hpp"
#include "hqq/core/codec.hpp"
#include "hqq/core/metadata.hpp"
#include "hqq/quantized_tensor.hpp"
#include "hqq/tiled_tensor.hpp"
#include "python/bindings/config.hpp"

namespace hqq::python {
namespace {

constexpr const char* kWidthDoc = R"doc(A bit width and how its codes are packed into rows.

A code is split into two planes, low bits first. A row is a sequence of blocks, and a block stores
one plane after the other; a ternary block stores five codes a byte.
)doc";

constexpr const char* kRowBytesDoc = R"doc(Bytes that a packed row takes.

Args:
    nbits: 8, 6, 5, 4, 3, 2, 1.58 or 1.
    cols: Codes of the row.

Raises:
    ValueError: For another number of bits.

Example:
    >>> hqq_cpp._core.packed_row_bytes(3, 64)
    24
)doc";

constexpr const char* kSpecsDoc =
    R"doc(The tensors that a layer has in format 1, in the order of files.

Args:
    config: Settings of the layer; balance 'auto' is not allowed here.
    out_features: Rows of the weight.
    in_features: Columns of the weight.

Returns:
    Name, shape and dtype of every tensor.

Raises:
    ValueError: For balance 'auto' and for an empty shape.

Example:
    >>> config = hqq_cpp.LayerConfig(nbits=4, balance="none")
    >>> hqq_cpp._core.tensor_specs(config, 8, 128)
    [('W_q', (8, 64), 'uint8'), ('scale', (8, 2), 'float16'), ('zero', (8, 2), 'float16')]
)doc";

using Spec = std::tuple<std::string, Shape, std::string>;

std::vector<Spec> present_specs(const TensorSpecs& specs) {
  std::vector<Spec> result;
  for (const TensorSpec& spec : specs) {
    if (!spec.present) continue;
    result.emplace_back(spec.name, shape_to_python(spec.shape), dtype_name(spec.dtype));
  }
  return result;
}

std::vector<Spec> specs_of(const LayerConfig& config, std::int64_t out_features,
                           std::int64_t in_features) {
  return present_specs(tensor_specs(config, out_features, in_features));
}

std::vector<Spec> tile_specs_of(const LayerConfig& config, std::int64_t out_features,
                                std::int64_t in_features) {
  if (!can_tile(config, out_features, in_features)) {
    throw_invalid(
        "format",
        "W_q has the shape of tiles, and there are none: axis 0 has tiles if group_size is "
        "a multiple of 16 that divides out_features");
  }
  TiledTensor tiled;
  tiled.config = config;
  tiled.out_features = out_features;
  tiled.in_features = in_features;
  return present_specs(tiled.specs());
}

std::int64_t row_bytes(double nbits, std::int64_t cols) {
  const std::optional<BitWidth> width = bit_width_from_nbits(nbits);
  if (!width) throw_invalid("format", "nbits must be one of " + supported_nbits());
  return packed_row_bytes(*width, cols);
}

template <class Get>
void bind_part(py::class_<BitWidthInfo>& type, const char* name, Get get, const char* doc) {
  type.def_property_readonly(
      name, [get](const BitWidthInfo& info) { return get(info.format); }, doc);
}

}  // namespace

void bind_format(py::module_& m) {
  using core::RowFormat;
  py::class_<BitWidthInfo> type(m, "BitWidth", kWidthDoc);
  type.def_property_readonly(
      "nbits", [](const BitWidthInfo& info) { return nbits_to_python(info.width); },
      "8, 6, 5, 4, 3, 2, 1.58 or 1.");
  bind_part(
      type, "low_bits", [](RowFormat f) { return f.low_bits; },
      "Bits of the first plane; 0: ternary.");
  bind_part(
      type, "high_bits", [](RowFormat f) { return f.high_bits; },
      "Bits of the second plane; 0: there is none.");
  bind_part(
      type, "block", [](RowFormat f) { return f.block; },
      "Codes of a block; the last one of a row may be shorter.");
  bind_part(type, "max_code", [](RowFormat f) { return f.max_code; }, "Largest code.");
  py::tuple widths(kNumBitWidths);
  for (int i = 0; i < kNumBitWidths; ++i) {
    widths[static_cast<std::size_t>(i)] =
        py::cast(&kBitWidths[i], py::return_value_policy::reference);
  }
  m.attr("BIT_WIDTHS") = widths;
  m.attr("METADATA_BLOCK") = core::kMetadataBlock;
  m.attr("TERNARY_DIGITS") = core::kTernaryDigits;
  py::tuple names(kTensorNames.size());
  for (std::size_t i = 0; i < kTensorNames.size(); ++i) names[i] = py::str(kTensorNames[i]);
  m.attr("TENSOR_NAMES") = names;
  m.def("packed_row_bytes", &row_bytes, py::arg("nbits"), py::arg("cols"), kRowBytesDoc);
  m.def("tensor_specs", &specs_of, py::arg("config"), py::arg("out_features"),
        py::arg("in_features"), kSpecsDoc);
  m.def("tile_specs", &tile_specs_of, py::arg("config"), py::arg("out_features"),
        py::arg("in_features"),
        "The tensors of the same layer in tiles of the CPU kernels; see can_tile().");
}

}  // namespace hqq::python
