#include "src/io/checkpoint/quantized_source.hpp"

#include <array>
#include <fstream>
#include <set>

#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/io/atomic_file.hpp"
#include "src/io/safetensors/header.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

bool is_empty(const Json& value) { return value.empty() || value == false || value == ""; }

// What a tool writes about itself.
std::string method_of(const Json& mark) {
  for (const char* key : {"quant_method", "quantizer", "quant_algo", "quant_type", "mode"}) {
    if (mark.is_object() && mark.contains(key) && mark[key].is_string()) {
      return "method " + quote_text(mark[key].get<std::string>());
    }
  }
  for (const char* key : {"bits", "w_bit", "nbits"}) {
    if (mark.is_object() && mark.contains(key) && mark[key].is_number()) {
      return mark[key].dump() + " bits";
    }
  }
  return "an unnamed method";
}

bool is_mark(const std::string& key, const Json& value) {
  if (key == "quantization_config" || key == "compression_config") return !is_empty(value);
  // A common word: only with what MLX ("bits") and ModelOpt ("quant_algo") write inside.
  if (key != "quantization" || !value.is_object()) return false;
  for (const char* field : {"bits", "quant_algo", "quant_method"}) {
    if (value.contains(field) && !is_empty(value[field])) return true;
  }
  return false;
}

// `prefix` ends with a dot. The parser limits how deep this goes.
std::optional<std::string> find_mark(const Json& json, const std::string& prefix) {
  for (const auto& [key, value] : json.items()) {
    if (json.is_object() && is_mark(key, value)) {
      return "config.json has " + prefix + key + " of " + method_of(value);
    }
    if (!value.is_structured()) continue;
    if (auto found = find_mark(value, prefix + key + ".")) return found;
  }
  return std::nullopt;
}

struct MarkFile {
  const char* name;
  const char* tool;
};
constexpr std::array<MarkFile, 5> kMarkFiles = {{{"quantize_config.json", "AutoGPTQ"},
                                                 {"quant_config.json", "AutoAWQ"},
                                                 {"quantization_config.json", "AutoRound"},
                                                 {"hf_quant_config.json", "ModelOpt"},
                                                 {"quanto_qmap.json", "quanto"}}};

// A form in which tools store a weight: a tensor <stem><ending>, and another whose name begins with
// <stem><beside>, if `beside` is not empty. "*word": anything below <stem> with that word.
struct PackedForm {
  std::string_view ending;
  std::array<std::string_view, 6> beside;
  bool any_dtype;  // else a matrix of one of is_packed_dtype
  const char* tool;
};
constexpr std::array kPackedForms = {
    PackedForm{".qweight", {}, false, "GPTQ or AWQ"},
    PackedForm{".weight_packed", {}, false, "compressed-tensors"},
    PackedForm{".weight", {".weight.quant_state.", ".weight.absmax"}, true, "bitsandbytes"},
    PackedForm{".weight", {".SCB"}, false, "bitsandbytes"},
    PackedForm{".weight", {"*scale", ".absmax", ".weight_quantizer."}, false, ""},
    // Experts without .weight.
    PackedForm{"",
               {"_scale", "_weight_scale", ".scale", "._scale", ".absmax", ".quant_state."},
               false,
               ""},
    PackedForm{"_blocks", {"_scales"}, false, "MXFP4"},
    PackedForm{".W_q", {".scale", ".zero", ".meta"}, false, "HQQ"},
    PackedForm{".W_q", {".view_as_float", ".packing"}, true, "HQQ"},
    PackedForm{"._data", {"._scale"}, true, "quanto"},
    PackedForm{"._data._data", {"._scale"}, true, "quanto"},
    PackedForm{"_qdata", {"_scale", "_per_tensor_scale"}, true, "torchao"},
    PackedForm{".codes", {".codebooks"}, false, "AQLM"},
    PackedForm{".indices", {".centroids"}, false, "VPTQ"},
    PackedForm{".q_weight", {".q_scale", ".q_invperm"}, false, "ExLlamaV2"},
    PackedForm{".trellis", {".suh", ".svh"}, false, "ExLlamaV3"},
    PackedForm{".Qidxs", {".SU", ".SV"}, true, "QuIP#"},
    PackedForm{".dense_weights", {".row_offsets"}, true, "SpQR"},
};

using Names = std::set<std::string_view>;

std::optional<std::string> found_beside(const PackedForm& form, const std::string& stem,
                                        const Names& names) {
  for (const std::string_view beside : form.beside) {
    if (beside.empty()) continue;
    const bool anywhere = beside.starts_with('*');
    const std::string start = stem + (anywhere ? "." : std::string(beside));
    for (auto name = names.lower_bound(start); name != names.end() && name->starts_with(start);
         ++name) {
      if (anywhere && name->find(beside.substr(1), start.size()) == std::string_view::npos)
        continue;
      return std::string(*name);
    }
  }
  return std::nullopt;
}

std::optional<std::string> packed_as(const PackedForm& form, const ListedTensor& tensor,
                                     const Names& names) {
  if (!tensor.name.ends_with(form.ending)) return std::nullopt;
  const bool is_matrix = tensor.shape.size() >= 2;
  if (!form.any_dtype && !(is_matrix && is_packed_dtype(tensor.dtype))) return std::nullopt;
  const std::string stem = tensor.name.substr(0, tensor.name.size() - form.ending.size());
  std::string text = "tensor " + quote_text(tensor.name) + " in " + quote_text(tensor.file) +
                     " is " + tensor.dtype;
  if (!form.beside[0].empty()) {
    const auto companion = found_beside(form, stem, names);
    if (!companion) return std::nullopt;
    text += " and has " + quote_text(*companion) + " beside it";
  }
  if (*form.tool != '\0') text += std::string(", the form of ") + form.tool;
  return text;
}

std::vector<ListedTensor> list_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::array<std::byte, kHeaderLengthBytes> prefix{};
  file.read(reinterpret_cast<char*>(prefix.data()), prefix.size());
  if (!file) return {};
  const std::string name = path.filename().string();
  std::string header(parse_header_length(prefix, fs::file_size(path), name), '\0');
  file.read(header.data(), static_cast<std::streamsize>(header.size()));
  if (!file) return {};
  std::vector<ListedTensor> tensors;
  const auto json = parse_json(header, name);
  for (const auto& [key, value] : json.items()) {
    const bool is_tensor = value.is_object() && value.contains("dtype") &&
                           value["dtype"].is_string() && value.contains("shape") &&
                           value["shape"].is_array();
    if (!is_tensor) continue;
    ListedTensor tensor{key, value["dtype"].get<std::string>(), {}, name};
    for (const auto& dimension : value["shape"]) {
      if (dimension.is_number_integer()) tensor.shape.push_back(dimension.get<std::int64_t>());
    }
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

// Nothing where a file cannot be read.
template <class Read>
auto read_or_nothing(const fs::path& path, const Read& read) -> decltype(read(path)) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) return {};
  try {
    return read(path);
  } catch (const FormatError&) {
    return {};
  } catch (const std::system_error&) {
    return {};
  }
}

}  // namespace

bool is_packed_dtype(const std::string& dtype) {
  static const std::set<std::string_view> kIntegers = {"U8", "I8", "U16", "I16", "U32", "I32"};
  return kIntegers.contains(dtype) || dtype.starts_with("F8_") || dtype.starts_with("F6_") ||
         dtype == "F4";
}

std::vector<ListedTensor> list_tensors(const Checkpoint& checkpoint) {
  std::vector<ListedTensor> tensors;
  for (std::size_t i = 0; i < checkpoint.shard_count(); ++i) {
    for (const TensorInfo& info : checkpoint.shard(i).tensors()) {
      tensors.push_back({info.name, std::string(safetensors_name(info.dtype)), info.shape,
                         checkpoint.shard_names()[i]});
    }
  }
  return tensors;
}

std::optional<std::string> quantization_in_config(const std::string& config_json) {
  if (config_json.empty()) return std::nullopt;
  return find_mark(parse_python_json(config_json, "config.json"), "");
}

std::optional<std::string> quantization_in_files(const fs::path& folder) {
  for (const auto& [name, tool] : kMarkFiles) {
    std::error_code error;
    if (!fs::exists(folder / name, error)) continue;
    return "it has the file " + quote_text(name) + " of " + tool;
  }
  return std::nullopt;
}

std::optional<std::string> quantization_in_tensors(const std::vector<ListedTensor>& tensors) {
  Names names;
  for (const ListedTensor& tensor : tensors) names.insert(tensor.name);
  for (const ListedTensor& tensor : tensors) {
    for (const PackedForm& form : kPackedForms) {
      if (auto found = packed_as(form, tensor, names)) return found;
    }
  }
  return std::nullopt;
}

std::optional<std::string> find_quantization(const Checkpoint& checkpoint) {
  if (auto found = quantization_in_config(checkpoint.config_json())) return found;
  if (fs::is_directory(checkpoint.path())) {
    if (auto found = quantization_in_files(checkpoint.path())) return found;
  }
  return quantization_in_tensors(list_tensors(checkpoint));
}

std::optional<std::string> find_quantization(const std::vector<fs::path>& files) {
  if (files.empty()) return std::nullopt;
  const fs::path folder = files[0].parent_path();
  if (auto found = read_or_nothing(folder / "config.json", [](const fs::path& path) {
        return quantization_in_config(read_text_file(path, kMaxConfigBytes));
      })) {
    return found;
  }
  if (auto found = quantization_in_files(folder)) return found;
  std::vector<ListedTensor> tensors;
  for (const fs::path& file : files) {
    if (file.extension() != ".safetensors") continue;
    const std::vector<ListedTensor> more = read_or_nothing(file, list_file);
    tensors.insert(tensors.end(), more.begin(), more.end());
  }
  return quantization_in_tensors(tensors);
}

}  // namespace hqq
