// How a checkpoint shows that its weights are quantized already: by what a config says, by a file
// that a tool leaves beside the weights, or by the tensors themselves.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "hqq/checkpoint.hpp"

namespace hqq {

// A tensor as a header lists it. Its type may be one that DType lacks: F4, F8_E8M0, ...
struct ListedTensor {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::string file;
};

std::vector<ListedTensor> list_tensors(const Checkpoint& checkpoint);

// What was found, for a message: `config.json has text_config.quantization_config of method "fp8"`.
// nullopt if nothing says that the weights are quantized.
std::optional<std::string> quantization_in_config(const std::string& config_json);
std::optional<std::string> quantization_in_files(const std::filesystem::path& folder);
std::optional<std::string> quantization_in_tensors(const std::vector<ListedTensor>& tensors);

std::optional<std::string> find_quantization(const Checkpoint& checkpoint);
// Looks at weight files that other code will read, and at their folder. What cannot be
// read here (pickles, broken files) is passed over: whoever reads it says so.
std::optional<std::string> find_quantization(const std::vector<std::filesystem::path>& files);

// True for a type of at most 32 bits in which tools store quantized weights.
bool is_packed_dtype(const std::string& dtype);

}  // namespace hqq
