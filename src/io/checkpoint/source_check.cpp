#include "src/io/checkpoint/source_check.hpp"

#include <algorithm>
#include <cstdio>

#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/io/checkpoint/quantized_source.hpp"
#include "src/io/checkpoint/source_files.hpp"
#include "src/io/formats/layer_store.hpp"
#include "src/model/role_names.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSourceWhere = "quantize";
constexpr const char* kMergeFirst = "; merge it into its base model first";

[[noreturn]] void throw_quantized(const fs::path& source, const std::string& what) {
  throw_invalid(kSourceWhere, quote_text(source.string()) + " is already quantized: " + what +
                                  "; an unquantized checkpoint is needed");
}

std::string shown(const ListedTensor& tensor) {
  return quote_text(tensor.name) + " (" + tensor.dtype + " " + shape_string(tensor.shape) + ")";
}

// "X.lora_A.weight", "lora_unet_x.lora_down.weight", and whatever peft saves.
bool is_adapter_tensor(const std::string& name) {
  return name.starts_with("base_model.model.") || is_below_adapter(name) ||
         name.find(".lora.") != std::string::npos;
}

bool is_in_weight_place(const ListedTensor& tensor) {
  if (tensor.shape.size() < 2) return false;
  return tensor.name.ends_with(".weight") || tensor.name.find(".experts.") != std::string::npos;
}

void check_no_adapter(const Checkpoint& source, const std::vector<ListedTensor>& tensors) {
  const std::string path = quote_text(source.path().string());
  if (const auto folder = checkpoint_folder(source); folder && is_adapter_folder(*folder)) {
    throw_invalid(kSourceWhere, path +
                                    " has an adapter_config.json, so that loaders take it for an "
                                    "adapter" +
                                    kMergeFirst + ", or remove the adapter's files");
  }
  const bool all =
      !tensors.empty() && std::all_of(tensors.begin(), tensors.end(),
                                      [](const auto& t) { return is_adapter_tensor(t.name); });
  if (all) {
    throw_invalid(kSourceWhere, path + " is an adapter: all of its tensors are like " +
                                    quote_text(tensors[0].name) + kMergeFirst);
  }
}

std::string size_text(std::uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MB", static_cast<double>(bytes) / 1e6);
  return text;
}

// "a", "b", "c" and 3 more.
std::string first_of(const std::vector<std::string>& items) {
  constexpr std::size_t kShown = 3;
  std::string text;
  for (std::size_t i = 0; i < std::min(items.size(), kShown); ++i) {
    text += (i == 0 ? "" : ", ") + items[i];
  }
  if (items.size() > kShown) text += " and " + std::to_string(items.size() - kShown) + " more";
  return text;
}

std::string list_of_files(const fs::path& folder, const std::vector<std::string>& names) {
  std::vector<std::string> items;
  for (const std::string& name : names) {
    items.push_back(quote_text(name) + " (" + size_text(fs::file_size(folder / name)) + ")");
  }
  return first_of(items);
}

// Tensors of files below the folder are parts of their own (the dense layers of
// sentence-transformers), or the model once more.
void warn_of_copies(const fs::path& folder, std::uint64_t result_bytes, bool follow_links,
                    std::vector<std::string>& warnings) {
  std::vector<std::string> copies;
  std::uint64_t size = 0;
  for (const std::string& name : other_files(folder, follow_links)) {
    if (!name.ends_with(".safetensors")) continue;
    copies.push_back(name);
    size += fs::file_size(folder / name);
  }
  if (size <= result_bytes) return;
  warnings.push_back(
      "weight files in subfolders are copied as they are, and take more than the "
      "quantized model: " +
      list_of_files(folder, copies));
}

}  // namespace

Checkpoint open_dense_source(const fs::path& path, bool follow_links) {
  try {
    return Checkpoint(path, follow_links);
  } catch (const FormatError&) {
    if (const auto found = find_quantization(weight_files(path))) throw_quantized(path, *found);
    throw;
  }
}

void check_dense_source(const Checkpoint& source) {
  if (is_quantized_by_us(source)) {
    throw_invalid(kSourceWhere, quote_text(source.path().string()) +
                                    " is already quantized by hqq_cpp; dequantize it first");
  }
  const std::vector<ListedTensor> tensors = list_tensors(source);
  check_no_adapter(source, tensors);
  if (const auto found = find_quantization(source)) throw_quantized(source.path(), *found);
  for (const ListedTensor& tensor : tensors) {
    if (!tensor.dtype.starts_with("F8_") || !is_in_weight_place(tensor)) continue;
    throw_invalid(kSourceWhere,
                  "tensor " + shown(tensor) + " in " + quote_text(tensor.file) +
                      " is an 8-bit float weight without a scale; convert it to F16, BF16 "
                      "or F32 first");
  }
}

bool is_adapter_folder(const fs::path& folder) {
  std::error_code error;
  return fs::exists(folder / "adapter_config.json", error);
}

std::vector<std::string> source_warnings(const Checkpoint& source, std::uint64_t result_bytes,
                                         bool follow_links) {
  std::vector<std::string> warnings;
  if (const auto folder = checkpoint_folder(source)) {
    const std::vector<std::string> stray = stray_weights(source);
    if (!stray.empty()) {
      warnings.push_back("no part of the checkpoint, and left out: " +
                         list_of_files(*folder, stray));
    }
    warn_of_copies(*folder, result_bytes, follow_links, warnings);
  }
  std::vector<std::string> integers;
  for (const ListedTensor& tensor : list_tensors(source)) {
    if (is_packed_dtype(tensor.dtype) && is_in_weight_place(tensor)) {
      integers.push_back(shown(tensor));
    }
  }
  if (!integers.empty()) {
    warnings.push_back("integers in the place of weights are copied as they are: " +
                       first_of(integers));
  }
  return warnings;
}

}  // namespace hqq
