// verify_checkpoint: is this folder, to the last bit, what quantize_checkpoint wrote?
#include <cmath>
#include <optional>
#include <set>

#include "hqq/checkpoint.hpp"
#include "hqq/core/codec.hpp"
#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/format/float_values.hpp"
#include "src/io/atomic_file.hpp"
#include "src/io/checkpoint/manifest.hpp"
#include "src/io/checkpoint/pipeline.hpp"
#include "src/io/formats/layer_store.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;

// Everything in the folder, relative with '/'; links and special files too, since they do not
// belong.
std::set<std::string> list_files(const fs::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (entry.is_directory() && !entry.is_symlink()) continue;
    names.insert(entry.path().lexically_relative(folder).generic_string());
  }
  return names;
}

class Verifier {
 public:
  Verifier(const fs::path& folder, const CheckpointOptions& options)
      : folder_(folder), options_(options) {}

  VerifyReport run() {
    const std::optional<Manifest> manifest = open_manifest();
    const std::set<std::string> present = list_files(folder_);
    if (manifest) check_files(*manifest, present);
    check_layers();
    return std::move(report_);
  }

 private:
  void problem(const std::string& text) { report_.problems.push_back(text); }

  std::optional<Manifest> open_manifest() {
    if (!fs::exists(folder_ / kManifestName)) {
      problem(std::string(kManifestName) +
              " is missing: without it no change to the files can be found");
      return std::nullopt;
    }
    try {
      Manifest manifest = read_manifest(folder_);
      ++report_.files;
      report_.bytes += fs::file_size(folder_ / kManifestName);
      return manifest;
    } catch (const FormatError& error) {
      problem(error.what());
      return std::nullopt;
    }
  }

  void check_files(const Manifest& manifest, const std::set<std::string>& present) {
    std::uint64_t total = 0;
    for (const auto& [name, record] : manifest.files) total += record.size;
    ProgressMeter meter("verify", total, options_.progress);
    for (const std::string& name : present) {
      if (name != kManifestName && !manifest.files.contains(name)) {
        problem(quote_text(name) + " does not belong to the folder: the manifest does not list it");
      }
    }
    for (const auto& [name, record] : manifest.files) {
      if (!present.contains(name)) {
        problem(quote_text(name) + " is missing");
        meter.advance(record.size);
        continue;
      }
      check_file(manifest, name, record, meter);
    }
    meter.finish();
  }

  void check_file(const Manifest& manifest, const std::string& name, const FileRecord& record,
                  ProgressMeter& meter) {
    const fs::path path = folder_ / name;
    if (!fs::is_regular_file(fs::symlink_status(path))) {
      problem(quote_text(name) + " is not a regular file");
      return;
    }
    ++report_.files;
    FileRecord found{fs::file_size(path), ""};
    report_.bytes += found.size;
    found.xxh3_128 = hash_file(path, [&](std::uint64_t bytes) {
      meter.advance(bytes);
      meter.report(name);
    });
    if (found == record) return;
    for (const auto& [other, expected] : manifest.files) {
      if (expected == found) {
        problem(quote_text(name) + " holds what belongs into " + quote_text(other));
        return;
      }
    }
    if (found.size != record.size) {
      problem(quote_text(name) + " has " + std::to_string(found.size) +
              " bytes; the manifest says " + std::to_string(record.size));
    } else {
      problem(quote_text(name) + " was changed or damaged: its hash is " + found.xxh3_128 +
              ", the manifest says " + record.xxh3_128);
    }
  }

  void check_layers() {
    try {
      const Checkpoint checkpoint(folder_);
      const std::vector<StoredLayer> layers = read_stored_layers(checkpoint);
      if (layers.empty()) problem("no shard describes a quantized layer");
      std::uint64_t weights = 0;
      for (const StoredLayer& layer : layers) {
        weights += static_cast<std::uint64_t>(layer.description.numel());
      }
      ProgressMeter meter("verify layers", weights, options_.progress);
      for (const StoredLayer& layer : layers) {
        check_layer(layer, meter);
        ++report_.layers;
      }
      meter.finish();
    } catch (const FormatError& error) {
      problem(error.what());
    }
  }

  void check_layer(const StoredLayer& layer, ProgressMeter& meter) {
    const LayerDescription& description = layer.description;
    const bool ternary = description.config.nbits == BitWidth::kTernary;
    for (std::int64_t expert = 0; expert < description.matrices(); ++expert) {
      const std::string name = quote_text(description.name) +
                               (description.is_fused() ? ", expert " + std::to_string(expert) : "");
      // Only ternary bytes can be invalid; for other widths W_q is not read.
      const QuantizedTensor q = read_matrix(layer, expert, !ternary);
      for (const auto& [field, tensor] : q.tensors()) check_finite(name, field, *tensor);
      if (ternary) check_ternary(name, q.W_q);
      meter.advance(static_cast<std::uint64_t>(q.out_features * q.in_features));
      meter.report(description.name);
    }
  }

  void check_finite(const std::string& layer, const std::string& field, const Tensor& tensor) {
    if (!is_weight_dtype(tensor.dtype)) return;
    const std::vector<float> values = read_values(tensor);
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (std::isfinite(values[i])) continue;
      problem("layer " + layer + ": " + field + " is not finite at position " + std::to_string(i));
      return;
    }
  }

  void check_ternary(const std::string& layer, const Tensor& W_q) {
    const auto* bytes = W_q.data<std::uint8_t>();
    for (std::size_t i = 0; i < W_q.nbytes(); ++i) {
      if (bytes[i] <= core::kTernaryMaxByte) continue;
      problem("layer " + layer + ": W_q holds " + std::to_string(bytes[i]) + " at byte " +
              std::to_string(i) + "; ternary bytes are at most " +
              std::to_string(core::kTernaryMaxByte));
      return;
    }
  }

  const fs::path folder_;
  const CheckpointOptions& options_;
  VerifyReport report_;
};

}  // namespace

VerifyReport verify_checkpoint(const fs::path& path, const CheckpointOptions& options) {
  if (!fs::is_directory(path)) {
    throw_invalid("verify",
                  quote_text(path.string()) +
                      " is not a folder; verify needs a folder that quantize has written");
  }
  return Verifier(path, options).run();
}

}  // namespace hqq
