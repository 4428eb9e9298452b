// The header of a safetensors file: 8 bytes of length (little endian), then JSON, then the data.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "hqq/safetensors.hpp"

namespace hqq {

inline constexpr std::uint64_t kHeaderLengthBytes = 8;
// The limit of the safetensors package: a larger header is a hostile one.
inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // in the order of their data
  std::map<std::string, std::string> metadata;
};

// The length in the first bytes of a file of `file_size` bytes, checked to lie within the limit and
// the file. `file` names the file in messages. All functions here throw FormatError.
std::uint64_t parse_header_length(std::span<const std::byte> prefix, std::uint64_t file_size,
                                  const std::string& file);

// Parses and validates the JSON; `data_size` bytes follow it in the file.
SafetensorsHeader parse_safetensors_header(std::string_view text, std::uint64_t data_size,
                                           const std::string& file);

// Computes begin and end of each tensor and returns the size of the data section. Throws
// std::invalid_argument for a name that is used twice or reserved, and for an invalid shape.
std::uint64_t assign_offsets(std::vector<TensorInfo>& tensors, const std::string& file);

// Length, JSON and the spaces that align the data section. Throws std::invalid_argument for text
// that is not UTF-8 and for more than kMaxHeaderBytes.
std::string format_safetensors_header(const std::vector<TensorInfo>& tensors,
                                      const std::map<std::string, std::string>& metadata,
                                      const std::string& file);

}  // namespace hqq
