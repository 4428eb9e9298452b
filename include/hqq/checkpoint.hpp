// Checkpoint folders: quantize, dequantize, convert, verify, compare. Every function streams:
// memory stays near the largest matrix, whatever the size of the model.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "hqq/config.hpp"
#include "hqq/device.hpp"
#include "hqq/quantized_tensor.hpp"
#include "hqq/quantizer.hpp"
#include "hqq/safetensors.hpp"

namespace hqq {

// What is going on in a long operation. Called from one thread, not more than about ten times a
// second and once at the end.
struct Progress {
  std::string stage;       // "quantize", "verify", ...
  std::string current;     // tensor or file
  std::uint64_t done = 0;  // weights (or bytes for verify and copies)
  std::uint64_t total = 0;
  double seconds = 0;
};
// Returns false to stop: the operation throws Interrupted and leaves nothing half-written.
using ProgressCallback = std::function<bool(const Progress&)>;

// A folder (model.safetensors, or model.safetensors.index.json and its shards) or a single
// .safetensors file, opened and validated.
class Checkpoint {
 public:
  // Throws FormatError for a broken index (a path that leaves the folder, a shard that is missing,
  // a tensor listed in the wrong shard or twice) or file, std::system_error from the OS. A shard
  // that is a link to a file elsewhere is refused, unless follow_links.
  explicit Checkpoint(const std::filesystem::path& path, bool follow_links = false);

  const std::filesystem::path& path() const { return path_; }
  bool is_sharded() const { return sharded_; }
  // File names in sorted order; one for an unsharded checkpoint.
  const std::vector<std::string>& shard_names() const { return shard_names_; }
  const SafetensorsFile& shard(std::size_t index) const { return *shards_[index]; }
  std::size_t shard_count() const { return shards_.size(); }
  // The tensor and its shard, or {nullptr, 0}.
  std::pair<const TensorInfo*, std::size_t> find(const std::string& name) const;
  // Parsed config.json as text; empty if there is none.
  const std::string& config_json() const { return config_json_; }
  std::uint64_t total_bytes() const;

 private:
  std::filesystem::path path_;
  bool sharded_ = false;
  std::vector<std::string> shard_names_;
  std::vector<std::shared_ptr<SafetensorsFile>> shards_;
  std::map<std::string, std::pair<std::size_t, std::size_t>> where_;  // name -> shard, tensor
  std::string config_json_;
};

// What was done with one layer.
struct LayerReport {
  std::string name;
  std::string tag;
  LayerConfig config;
  std::vector<std::int64_t> shape;  // of the weight: [out, in] or [experts, out, in]
  std::uint64_t bytes_before = 0;
  std::uint64_t bytes_after = 0;
  QuantizeStats stats;
};

struct QuantizeReport {
  std::vector<LayerReport> layers;
  std::vector<std::string> copied;  // 2-D and larger tensors that were left as they are
  // One sentence each: names of the config that fit no layer, weights that are left out.
  std::vector<std::string> warnings;
  std::uint64_t bytes_before = 0;  // all tensors
  std::uint64_t bytes_after = 0;
  std::uint64_t weights = 0;   // quantized
  double bits_per_weight = 0;  // of the quantized layers, metadata included
  double seconds = 0;
};

struct QuantizeCheckpointOptions {
  int threads = 0;
  Device device = Device::cpu();
  bool dry_run = false;  // only the report (no statistics, nothing written)
  bool force = false;    // replace an existing destination
  bool resume = false;   // go on from finished shards of an interrupted run
  bool stats = true;
  bool follow_links = false;  // use files that the folder links to from elsewhere
  // Safetensors file with one 1-D tensor per layer name; empty: none.
  std::filesystem::path importance;
  ProgressCallback progress;
};

// Quantizes the checkpoint folder `source` into the new folder `destination` (docs/format.md). The
// destination appears under its name only when it is whole.
QuantizeReport quantize_checkpoint(const std::filesystem::path& source,
                                   const std::filesystem::path& destination,
                                   const HqqConfig& config,
                                   const QuantizeCheckpointOptions& options = {});

struct CheckpointOptions {
  int threads = 0;
  bool force = false;
  ProgressCallback progress;
  bool follow_links = false;  // use files that the folder links to from elsewhere
};

// Writes the checkpoint with every quantized layer as a dense `dtype` weight again.
void dequantize_checkpoint(const std::filesystem::path& source,
                           const std::filesystem::path& destination, DType dtype,
                           const CheckpointOptions& options = {});

// kHqqCpp: our format 1. kUpstream: the state_dict layout of upstream hqq 0.2.x.
enum class CheckpointFormat { kHqqCpp, kUpstream };
// "hqq_cpp", "upstream".
std::string to_string(CheckpointFormat format);
// Throws std::invalid_argument for another name.
CheckpointFormat checkpoint_format_from_string(const std::string& name);

// Writes the checkpoint in another format: format 1 to any, any to format 1.
void convert_checkpoint(const std::filesystem::path& source,
                        const std::filesystem::path& destination, CheckpointFormat to,
                        const CheckpointOptions& options = {});

// Reads one quantized layer of a format-1 checkpoint. For fused experts [E, out, in] `expert`
// selects the matrix. Throws std::invalid_argument when there is no such layer.
QuantizedTensor load_quantized(const Checkpoint& checkpoint, const std::string& layer_name,
                               std::int64_t expert = 0);
// Names of the quantized layers of a format-1 checkpoint, in file order.
std::vector<std::string> quantized_layers(const Checkpoint& checkpoint);

struct VerifyReport {
  std::vector<std::string> problems;  // one sentence each; empty: the folder is whole
  std::uint64_t files = 0;
  std::uint64_t layers = 0;
  std::uint64_t bytes = 0;
};
// Recomputes every hash of the manifest and the invariants of every layer.
VerifyReport verify_checkpoint(const std::filesystem::path& path,
                               const CheckpointOptions& options = {});

struct TensorDiff {
  std::string name;
  double mean_abs = 0;
  double rms = 0;
  double max_abs = 0;
  double relative = 0;  // ||A - B|| / ||A||
  bool identical = false;
  std::string note;  // "only in A", "shapes differ: ...", or empty
};
// Compares two checkpoints tensor by tensor on dense values (quantized layers are dequantized).
std::vector<TensorDiff> diff_checkpoints(const std::filesystem::path& a,
                                         const std::filesystem::path& b,
                                         const CheckpointOptions& options = {});

}  // namespace hqq
