#include "src/io/checkpoint/importance.hpp"

#include <cmath>

#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/format/float_values.hpp"

namespace hqq {
namespace {

constexpr const char* kImportanceWhere = "importance";

std::vector<float> read_row(const SafetensorsFile& file, const TensorInfo& info, std::int64_t row,
                            std::int64_t cols) {
  const std::size_t bytes = static_cast<std::size_t>(cols) * dtype_size(info.dtype);
  std::vector<std::byte> raw(bytes);
  file.read(info, bytes * static_cast<std::uint64_t>(row), raw);
  std::vector<float> values(static_cast<std::size_t>(cols));
  read_values(info.dtype, raw.data(), values);
  return values;
}

void check_row(const std::string& tensor, const std::vector<float>& values) {
  bool all_zero = true;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i]) || values[i] < 0) {
      throw_format(kImportanceWhere, tensor + " holds " + std::to_string(values[i]) +
                                         " at position " + std::to_string(i) +
                                         "; values must be finite and >= 0");
    }
    all_zero = all_zero && values[i] == 0;
  }
  if (all_zero)
    throw_format(kImportanceWhere, tensor + " is all zeros; at least one value must be > 0");
}

}  // namespace

ImportanceFile::ImportanceFile(const std::filesystem::path& path) {
  if (path.empty()) return;
  path_ = path;
  file_.emplace(path);
}

bool ImportanceFile::has(const std::string& layer) const {
  return file_ && file_->find(layer) != nullptr;
}

void ImportanceFile::check(const LayerDescription& layer) const {
  const TensorInfo& info = *file_->find(layer.name);
  const std::string tensor = "tensor " + quote_text(info.name);
  if (!is_weight_dtype(info.dtype)) {
    throw_format(kImportanceWhere, tensor + " is " + std::string(safetensors_name(info.dtype)) +
                                       "; it must be F32, F16, BF16 or F64");
  }
  const std::int64_t cols = layer.in_features();
  const bool per_expert = layer.is_fused() && info.shape == std::vector{layer.matrices(), cols};
  if (info.shape != std::vector{cols} && !per_expert) {
    std::string wanted = shape_string({cols});
    if (layer.is_fused()) wanted += " or " + shape_string({layer.matrices(), cols});
    throw_format(kImportanceWhere, tensor + " has the shape " + shape_string(info.shape) +
                                       "; layer " + shape_string(layer.shape) + " needs " + wanted);
  }
  for (std::int64_t row = 0; row < (per_expert ? layer.matrices() : 1); ++row) {
    check_row(per_expert ? tensor + ", expert " + std::to_string(row) : tensor,
              read_row(*file_, info, row, cols));
  }
}

std::vector<float> ImportanceFile::read(const LayerDescription& layer, std::int64_t expert) const {
  const TensorInfo& info = *file_->find(layer.name);
  return read_row(*file_, info, info.shape.size() == 2 ? expert : 0, layer.in_features());
}

void ImportanceFile::check_names(const ModelNames& names) const {
  if (!file_) return;
  std::vector<std::string> given;
  for (const TensorInfo& info : file_->tensors()) given.push_back(info.name);
  HqqConfig no_rules;
  no_rules.skip_modules.clear();
  const std::vector<UnmatchedName> unknown = unmatched_names(no_rules, names, given);
  if (unknown.empty()) return;
  throw_format(kImportanceWhere, "the checkpoint has no layer " + quote_text(unknown[0].name) +
                                     "; nearest is " + quote_text(unknown[0].nearest) +
                                     ": tensors must bear layer names");
}

}  // namespace hqq
