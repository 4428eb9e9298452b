// The file of importance weights: one 1-D tensor for each layer name (docs/format.md).
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "hqq/config.hpp"
#include "hqq/safetensors.hpp"
#include "src/io/formats/layer_store.hpp"

namespace hqq {

class ImportanceFile {
 public:
  // An empty path: no importance for any layer.
  explicit ImportanceFile(const std::filesystem::path& path);

  const std::optional<std::filesystem::path>& path() const { return path_; }
  bool has(const std::string& layer) const;
  // Throws FormatError, naming the tensor, unless that of `layer` is [in_features] (for fused
  // experts also [experts, in_features]), of a float type, finite, >= 0 and not all zero.
  void check(const LayerDescription& layer) const;
  // Throws FormatError naming the first tensor that bears no layer's name, and the nearest of
  // those.
  void check_names(const ModelNames& names) const;
  // Values for matrix `expert` of a layer that has() and check() have accepted.
  std::vector<float> read(const LayerDescription& layer, std::int64_t expert) const;

 private:
  std::optional<std::filesystem::path> path_;
  std::optional<SafetensorsFile> file_;
};

}  // namespace hqq
