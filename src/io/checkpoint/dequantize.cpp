// dequantize_checkpoint: every quantized layer becomes a dense weight again.
#include <algorithm>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "src/backend.hpp"
#include "src/base/json.hpp"
#include "src/base/json_edit.hpp"
#include "src/io/checkpoint/output_folder.hpp"
#include "src/io/checkpoint/shard_job.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;

constexpr const char* kDequantizeWhere = "dequantize";

struct DensePlan {
  std::vector<ShardPlan> shards;
  std::vector<StoredLayer> layers;
};

ShardPlan plan_shard(const Checkpoint& source, std::size_t index,
                     const std::vector<StoredLayer>& layers, DType dtype) {
  // Every tensor of a layer; the dense weight takes the place of the first, W_q.
  std::map<const TensorInfo*, std::size_t> layer_of;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    for (const StoredField& field : layers[i].fields) layer_of[field.info] = i;
  }
  ShardPlan shard;
  shard.name = output_shard_name(source, index);
  shard.metadata = source.shard(index).metadata();
  shard.metadata.erase(kLayersMetadataKey);
  for (const TensorInfo& tensor : source.shard(index).tensors()) {
    const auto found = layer_of.find(&tensor);
    if (found == layer_of.end()) {
      shard.copy(tensor, index);
      continue;
    }
    const StoredLayer& layer = layers[found->second];
    if (&tensor != layer.fields.front().info) continue;
    const LayerDescription& description = layer.description;
    const std::uint64_t size = static_cast<std::uint64_t>(description.numel()) * dtype_size(dtype);
    shard.tensors.push_back({description.tensor, dtype, description.dense_shape(), 0, size});
    const std::uint64_t codes =
        tensor.nbytes() / static_cast<std::uint64_t>(description.matrices());
    for (std::int64_t expert = 0; expert < description.matrices(); ++expert) {
      shard.steps.push_back({index, found->second, expert, &tensor,
                             codes * static_cast<std::uint64_t>(expert), codes});
    }
  }
  shard.end_steps(index);
  return shard;
}

DensePlan plan_dense(const Checkpoint& source, DType dtype) {
  DensePlan plan;
  plan.layers = read_stored_layers(source);
  if (plan.layers.empty()) {
    throw_invalid(kDequantizeWhere, quote_text(source.path().string()) +
                                        " holds no layer that hqq_cpp has quantized");
  }
  for (std::size_t s = 0; s < source.shard_count(); ++s) {
    plan.shards.push_back(plan_shard(source, s, plan.layers, dtype));
  }
  return plan;
}

class DequantizeJob : public ShardJob {
 public:
  DequantizeJob(const Checkpoint& source, const DensePlan& plan, OutputFolder& output, DType dtype,
                int threads)
      : ShardJob(source, plan.shards, output),
        plan_(plan),
        dtype_(dtype),
        threads_(threads > 0 ? threads : default_threads()),
        output_pool_(largest_matrix(plan) * dtype_size(dtype)) {}

 protected:
  std::uint64_t matrix_input_bytes(const PlannedStep& step) const override {
    std::uint64_t total = 0;
    for (const StoredField& field : layer(step).fields) total += field.info->nbytes();
    return total / static_cast<std::uint64_t>(experts(step)) - step.size + pool().taken(step.size);
  }
  std::uint64_t matrix_output_bytes(const PlannedStep& step) const override {
    const std::uint64_t bytes = output_pool_.taken(matrix_weights(step) * dtype_size(dtype_));
    return layer(step).description.transposed ? 2 * bytes : bytes;
  }
  std::uint64_t matrix_weights(const PlannedStep& step) const override {
    const LayerDescription& description = layer(step).description;
    return static_cast<std::uint64_t>(description.out_features() * description.in_features());
  }
  std::int64_t experts(const PlannedStep& step) const override {
    return layer(step).description.matrices();
  }
  std::string matrix_name(const PlannedStep& step) const override {
    return layer(step).description.name;
  }

  std::vector<Tensor> read_step(const PlannedStep& step) override {
    QuantizedTensor q = read_matrix(layer(step), step.expert, false, &pool());
    std::vector<Tensor> tensors;
    for (const auto& [field, tensor] : q.fields()) tensors.push_back(*tensor);
    return tensors;
  }

  std::vector<Tensor> compute_step(const PlannedStep& step, std::vector<Tensor> input) override {
    const LayerDescription& description = layer(step).description;
    QuantizedTensor q;
    q.config = description.config;
    q.out_features = description.out_features();
    q.in_features = description.in_features();
    std::size_t i = 0;
    for (const auto& [field, tensor] : q.fields()) *tensor = std::move(input[i++]);
    // read_matrix has validated it. Not dequantize(), which takes memory from the heap.
    Tensor dense = output_pool_.allocate(dtype_, {q.out_features, q.in_features});
    cpu::dequantize(q, dense, threads_);
    if (!description.transposed) return {dense};
    Tensor stored = output_pool_.allocate(dtype_, {q.in_features, q.out_features});
    transpose_matrix(dense, stored);
    return {stored};
  }

 private:
  static std::uint64_t largest_matrix(const DensePlan& plan) {
    std::int64_t largest = 0;
    for (const StoredLayer& layer : plan.layers) {
      const LayerDescription& description = layer.description;
      largest = std::max(largest, description.out_features() * description.in_features());
    }
    return static_cast<std::uint64_t>(largest);
  }
  const StoredLayer& layer(const PlannedStep& step) const { return plan_.layers[step.layer]; }

  const DensePlan& plan_;
  const DType dtype_;
  const int threads_;
  BlockPool output_pool_;
};

}  // namespace

void dequantize_checkpoint(const fs::path& source_path, const fs::path& destination, DType dtype,
                           const CheckpointOptions& options) {
  if (!is_weight_dtype(dtype)) {
    throw_invalid(kDequantizeWhere, "dtype is " + std::string(dtype_name(dtype)) +
                                        "; it must be float32, bfloat16, float16 or float64");
  }
  if (options.threads < 0) {
    throw_invalid(kDequantizeWhere,
                  "threads is " + std::to_string(options.threads) + "; it must be >= 0");
  }
  const Checkpoint source(source_path, options.follow_links);
  const std::vector<std::string> others = other_files_of(source, options.follow_links);
  const DensePlan plan = plan_dense(source, dtype);
  OutputFolder output(source_path, destination,
                      {kDequantizeWhere, options.force, false, nullptr, options.progress});
  check_free_space(kDequantizeWhere, output.path(), total_data_bytes(plan.shards));

  DequantizeJob job(source, plan, output, dtype, options.threads);
  run_pipeline(job, kDequantizeWhere, options.progress);
  job.check_source(kDequantizeWhere);
  copy_files(source, others, output);
  if (source.is_sharded()) {
    output.write_file("model.safetensors.index.json", make_index(plan.shards, index_text(source)));
  }
  if (!source.config_json().empty()) {
    output.write_file("config.json", remove_json_member(source.config_json(), "quantization_config",
                                                        "config.json"));
  }
  output.commit();
}

}  // namespace hqq
