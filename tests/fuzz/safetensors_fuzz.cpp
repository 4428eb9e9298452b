// Feeds whole safetensors files to the header parser. Besides the sanitizers, it checks what must
// hold for every file that the parser accepts.
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string_view>

#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/io/safetensors/header.hpp"
#include "tests/fuzz/fuzz_util.hpp"

namespace {

using hqq::fuzzing::require;

bool same(const hqq::TensorInfo& a, const hqq::TensorInfo& b) {
  return a.name == b.name && a.dtype == b.dtype && a.shape == b.shape && a.begin == b.begin &&
         a.end == b.end;
}

// The tensors follow each other and fill the data, and what we would write reads back equal.
void check_accepted(const hqq::SafetensorsHeader& header, std::uint64_t data_size) {
  std::uint64_t position = 0;
  for (const hqq::TensorInfo& info : header.tensors) {
    require(info.begin == position && info.end >= info.begin, "no holes");
    const auto numel = static_cast<std::uint64_t>(hqq::checked_numel(info.shape, "fuzz"));
    require(info.nbytes() == numel * hqq::dtype_size(info.dtype), "sizes fit shapes");
    position = info.end;
  }
  require(position == data_size, "tensors fill the data");

  std::vector<hqq::TensorInfo> tensors = header.tensors;
  require(hqq::assign_offsets(tensors, "fuzz") == data_size, "we would use as much");
  const std::string text = hqq::format_safetensors_header(tensors, header.metadata, "fuzz");
  const hqq::SafetensorsHeader again = hqq::parse_safetensors_header(
      std::string_view(text).substr(hqq::kHeaderLengthBytes), data_size, "fuzz");
  require(again.metadata == header.metadata, "metadata reads back");
  require(again.tensors.size() == tensors.size(), "as many tensors read back");
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    require(same(again.tensors[i], header.tensors[i]), "a tensor reads back");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  try {
    const std::uint64_t length = hqq::parse_header_length(bytes, size, "fuzz");
    require(length <= size - hqq::kHeaderLengthBytes, "the header is inside");
    const std::string_view text(reinterpret_cast<const char*>(data) + hqq::kHeaderLengthBytes,
                                length);
    const std::uint64_t data_size = size - hqq::kHeaderLengthBytes - length;
    check_accepted(hqq::parse_safetensors_header(text, data_size, "fuzz"), data_size);
    // A header is JSON of the strictest kind.
    hqq::parse_json(std::string(text), "fuzz");
  } catch (const hqq::FormatError& error) {
    require(std::string_view(error.what()).size() < 1000, "messages are short");
  }
  // Index and config files go straight to the JSON parser.
  try {
    hqq::parse_json(std::string(reinterpret_cast<const char*>(data), size), "fuzz");
  } catch (const hqq::FormatError& error) {
    require(std::string_view(error.what()).size() < 1000, "messages are short");
  }
  return 0;
}
