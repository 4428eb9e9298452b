// quantize_checkpoint: plan, then read, solve and write at the same time, then publish the folder.
#include <algorithm>
#include <cmath>
#include <limits>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "hqq/version.hpp"
#include "src/backend.hpp"
#include "src/base/json.hpp"
#include "src/config/config_json.hpp"
#include "src/io/checkpoint/output_folder.hpp"
#include "src/io/checkpoint/plan.hpp"
#include "src/io/checkpoint/shard_job.hpp"
#include "src/io/checkpoint/source_check.hpp"
#include "src/io/checkpoint/source_files.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr const char* kQuantizeWhere = "quantize";

// Errors of one layer from those of its matrices, which may be known in any order.
struct LayerStats {
  std::vector<QuantizeStats> matrices;
  std::vector<double> counts;  // weights of each; 0: not known

  void set(std::int64_t matrix, const QuantizeStats& stats, double count) {
    matrices[static_cast<std::size_t>(matrix)] = stats;
    counts[static_cast<std::size_t>(matrix)] = count;
  }
  QuantizeStats result() const {
    double abs = 0, squares = 0, max = 0, norm = 0, weights = 0;
    for (std::size_t i = 0; i < matrices.size(); ++i) {
      const QuantizeStats& stats = matrices[i];
      const double error = stats.rms_error * stats.rms_error * counts[i];
      abs += stats.mean_abs_error * counts[i];
      squares += error;
      max = std::max(max, stats.max_abs_error);
      // ||W||^2 follows from the relative error; of a matrix without error it stays unknown, and
      // does not count.
      if (stats.relative_error > 0) norm += error / (stats.relative_error * stats.relative_error);
      weights += counts[i];
    }
    if (weights == 0) return {};
    return {abs / weights, std::sqrt(squares / weights), max,
            norm > 0 ? std::sqrt(squares / norm) : 0};
  }
};

Json stats_json(const QuantizeStats& stats) {
  return {stats.mean_abs_error, stats.rms_error, stats.max_abs_error, stats.relative_error};
}

// What an earlier run did not record: unknown, not zero.
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr QuantizeStats kUnknownStats = {kNaN, kNaN, kNaN, kNaN};

QuantizeStats stats_from_json(const Json& json) {
  if (!json.is_array() || json.size() != 4) return kUnknownStats;
  const auto number = [&](std::size_t i) {
    return json[i].is_number() ? json[i].get<double>() : kNaN;
  };
  return {number(0), number(1), number(2), number(3)};
}

class QuantizeJob : public ShardJob {
 public:
  QuantizeJob(const Checkpoint& source, const QuantizePlan& plan, OutputFolder& output,
              const HqqConfig& config, const ImportanceFile& importance,
              const QuantizeCheckpointOptions& options)
      : ShardJob(source, plan.shards, output),
        plan_(plan),
        quantizer_(config, options.device),
        importance_(importance),
        options_(options),
        stats_(plan.layers.size()) {
    for (std::size_t i = 0; i < stats_.size(); ++i) {
      const auto matrices = static_cast<std::size_t>(plan.layers[i].description.matrices());
      stats_[i] = {std::vector<QuantizeStats>(matrices), std::vector<double>(matrices)};
    }
  }

  QuantizeStats stats(std::size_t layer) const { return stats_[layer].result(); }

  // On a GPU one matrix is copied while another is solved; a CPU gives all threads to each.
  int compute_threads() const override { return on_gpu() ? 2 : 1; }

 protected:
  std::uint64_t matrix_input_bytes(const PlannedStep& step) const override {
    return pool().taken(step.size);
  }
  std::uint64_t matrix_output_bytes(const PlannedStep& step) const override {
    return layer(step).matrix_bytes_after();
  }
  std::uint64_t matrix_weights(const PlannedStep& step) const override {
    const LayerDescription& description = layer(step).description;
    return static_cast<std::uint64_t>(description.out_features() * description.in_features());
  }
  std::int64_t experts(const PlannedStep& step) const override {
    return layer(step).description.matrices();
  }
  std::string matrix_name(const PlannedStep& step) const override {
    const LayerDescription& description = layer(step).description;
    return description.is_fused() ? description.name + "[" + std::to_string(step.expert) + "]"
                                  : description.name;
  }

  std::vector<Tensor> read_step(const PlannedStep& step) override {
    const LayerDescription& description = layer(step).description;
    Tensor matrix =
        pool().allocate(description.dtype, {description.out_features(), description.in_features()});
    source_file(step).read(*step.source, step.offset, {matrix.buffer.data, matrix.buffer.size});
    return {matrix};
  }

  std::vector<Tensor> compute_step(const PlannedStep& step, std::vector<Tensor> input) override {
    const PlannedLayer& planned = layer(step);
    std::vector<float> importance;
    if (planned.has_importance) importance = importance_.read(planned.description, step.expert);
    QuantizeStats stats;
    QuantizeOptions options;
    options.importance = importance;
    options.threads = options_.threads;
    if (options_.stats) options.stats = &stats;
    QuantizedTensor q = quantizer_.quantize(TensorView(input[0]), planned.description.config,
                                            matrix_name(step), options);
    if (options_.stats) {
      stats_[step.layer].set(step.expert, stats, static_cast<double>(matrix_weights(step)));
    }
    std::vector<Tensor> output;
    std::size_t i = 0;
    for (const auto& [name, tensor] : q.fields()) {
      const TensorSpec& spec = planned.tensors[i++];
      if (bool(*tensor) != spec.present || tensor->nbytes() != spec.nbytes()) {
        throw std::logic_error("[quantize] layer " + planned.description.name + ": tensor " + name +
                               " is not what the plan says");
      }
      if (spec.present) output.push_back(*tensor);
    }
    return output;
  }

  // All matrices of the shard were computed before its last one was written.
  Json journal_extra(std::size_t shard) override {
    Json extra = Json::object();
    if (!options_.stats) return extra;
    for (const PlannedStep& step : plan_.shards[shard].steps) {
      if (step.layer == PlannedStep::kCopy || step.expert != 0) continue;
      extra[layer(step).description.name] = stats_json(stats(step.layer));
    }
    return extra;
  }

 private:
  const PlannedLayer& layer(const PlannedStep& step) const { return plan_.layers[step.layer]; }
  bool on_gpu() const { return options_.device.kind == Device::Kind::kCuda; }

  const QuantizePlan& plan_;
  Quantizer quantizer_;
  const ImportanceFile& importance_;
  const QuantizeCheckpointOptions& options_;
  std::vector<LayerStats> stats_;
};

Json make_request(const Checkpoint& source, const HqqConfig& config,
                  const ImportanceFile& importance, bool follow_links) {
  Json request;
  request["version"] = kVersion;
  request["format_version"] = kFormatVersion;
  request["config"] = config_to_json(config);
  request["importance"] = importance.path() ? fingerprint_file(*importance.path()) : Json();
  request["source"] = fingerprint_source(source, follow_links);
  return request;
}

// Statistics of shards that an interrupted run has finished.
void add_old_stats(const QuantizePlan& plan, const OutputFolder& output, QuantizeReport& report) {
  for (const ShardPlan& shard : plan.shards) {
    const Json* extra = output.finished_shard(shard.name);
    if (extra == nullptr) continue;
    for (const PlannedStep& step : shard.steps) {
      if (step.layer == PlannedStep::kCopy) continue;
      LayerReport& layer = report.layers[step.layer];
      layer.stats = stats_from_json(extra->is_object() ? extra->value(layer.name, Json()) : Json());
    }
  }
}

void write_manifest(OutputFolder& output, const Json& request) {
  Manifest manifest;
  manifest.version = kVersion;
  manifest.config = request["config"];
  manifest.source = without_times(request["source"]);
  manifest.importance = request["importance"];
  manifest.files = output.files();
  output.write_file(kManifestName, manifest_text(manifest));
}

}  // namespace

QuantizeReport quantize_checkpoint(const fs::path& source_path, const fs::path& destination,
                                   const HqqConfig& config,
                                   const QuantizeCheckpointOptions& options) {
  const double start = steady_seconds();
  if (options.threads < 0) {
    throw_invalid(kQuantizeWhere,
                  "threads is " + std::to_string(options.threads) + "; it must be >= 0");
  }
  const Checkpoint source = open_dense_source(source_path, options.follow_links);
  const ImportanceFile importance(options.importance);
  const QuantizePlan plan = plan_quantization(source, config, importance);
  QuantizeReport report = plan.report();
  for (std::string& warning : source_warnings(source, report.bytes_after, options.follow_links)) {
    report.warnings.push_back(std::move(warning));
  }
  if (options.dry_run) return report;
  // Before anything is written: throws if the GPU cannot be used.
  std::shared_ptr<void> gpu_memory;
  if (options.device.kind == Device::Kind::kCuda) {
    gpu_memory = cuda::keep_memory(options.device.index);
  }

  const Json request = make_request(source, config, importance, options.follow_links);
  OutputFolder output(source_path, destination,
                      {kQuantizeWhere, options.force, options.resume, request, options.progress});
  if (output.already_complete()) {
    if (options.stats) {
      for (LayerReport& layer : report.layers) layer.stats = kUnknownStats;
    }
    report.seconds = steady_seconds() - start;
    return report;
  }
  std::uint64_t missing = 0;
  for (const ShardPlan& shard : plan.shards) {
    if (output.finished_shard(shard.name) == nullptr) missing += shard.data_bytes();
  }
  check_free_space(kQuantizeWhere, output.path(), missing);
  // Before the job replaces what is known with what it finishes.
  if (options.stats) add_old_stats(plan, output, report);
  std::vector<bool> finished_before;
  for (const ShardPlan& shard : plan.shards) {
    finished_before.push_back(output.finished_shard(shard.name) != nullptr);
  }

  QuantizeJob job(source, plan, output, config, importance, options);
  run_pipeline(job, kQuantizeWhere, options.progress);
  job.check_source(kQuantizeWhere);
  for (std::size_t s = 0; s < plan.shards.size(); ++s) {
    if (finished_before[s]) continue;
    for (const PlannedStep& step : plan.shards[s].steps) {
      if (step.layer != PlannedStep::kCopy) report.layers[step.layer].stats = job.stats(step.layer);
    }
  }

  copy_files(source, other_files_of(source, options.follow_links), output);
  if (source.is_sharded()) {
    output.write_file("model.safetensors.index.json", plan.index_json(index_text(source)));
  }
  output.write_file("config.json", plan.config_json(source.config_json(), config));
  write_manifest(output, request);
  output.commit();
  report.seconds = steady_seconds() - start;
  return report;
}

}  // namespace hqq
