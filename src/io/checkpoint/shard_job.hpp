// What jobs that write a checkpoint shard by shard have in common.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "src/io/block_pool.hpp"
#include "src/io/checkpoint/output_folder.hpp"
#include "src/io/checkpoint/pipeline.hpp"
#include "src/io/checkpoint/plan.hpp"
#include "src/io/checkpoint/source_files.hpp"

namespace hqq {

// Bytes of the tensors of fused experts that must wait: experts come one after the other, but in
// the file all of their W_q precede all of their scales. They wait in an unnamed file, not in
// memory.
class Spill {
 public:
  explicit Spill(const std::filesystem::path& folder);
  ~Spill();
  Spill(const Spill&) = delete;
  Spill& operator=(const Spill&) = delete;

  void write(std::uint64_t offset, std::span<const std::byte> bytes);
  // Appends the first `size` bytes to `writer`.
  void append_to(SafetensorsWriter& writer, std::uint64_t size);

 private:
  std::filesystem::path folder_;
  int fd_ = -1;
};

class ShardJob : public PipelineJob {
 public:
  // Leaves out the shards that `output` already has.
  ShardJob(const Checkpoint& source, const std::vector<ShardPlan>& shards, OutputFolder& output);

  std::size_t step_count() const override { return steps_.size(); }
  std::string step_name(std::size_t step) const override;
  std::vector<Tensor> read(std::size_t step) override;
  void write(std::size_t step, std::vector<Tensor> output) override;
  void finish() override {}
  // Copies pass through.
  std::uint64_t input_bytes(std::size_t step) const override;
  std::uint64_t output_bytes(std::size_t step) const override;
  std::vector<Tensor> compute(std::size_t step, std::vector<Tensor> input) override;
  std::uint64_t step_work(std::size_t step) const override;

  // Throws std::invalid_argument where a shard of the source was written to or replaced since this
  // job was made: what was read of it may be old and new at once.
  void check_source(const std::string& where) const;

 protected:
  const SafetensorsFile& source_file(const PlannedStep& step) const {
    return source_.shard(step.shard);
  }

  // For the inputs of steps.
  BlockPool& pool() { return pool_; }
  const BlockPool& pool() const { return pool_; }

  // Bytes and weights of steps that are a matrix.
  virtual std::uint64_t matrix_input_bytes(const PlannedStep& step) const = 0;
  virtual std::uint64_t matrix_output_bytes(const PlannedStep& step) const = 0;
  virtual std::uint64_t matrix_weights(const PlannedStep& step) const = 0;
  virtual std::string matrix_name(const PlannedStep& step) const = 0;
  virtual std::int64_t experts(const PlannedStep& step) const = 0;
  virtual std::vector<Tensor> read_step(const PlannedStep& step) = 0;
  virtual std::vector<Tensor> compute_step(const PlannedStep& step, std::vector<Tensor> input) = 0;
  // Kept in the journal with a finished shard. On the writer thread.
  virtual nlohmann::ordered_json journal_extra(std::size_t /*shard*/) { return nullptr; }

 private:
  void write_matrix(const PlannedStep& step, const std::vector<Tensor>& output);

  const Checkpoint& source_;
  const std::vector<ShardPlan>& shards_;
  OutputFolder& output_;
  std::vector<FileState> source_states_;  // one a shard
  BlockPool pool_;
  std::vector<PlannedStep> steps_;
  std::unique_ptr<SafetensorsWriter> writer_;
  std::unique_ptr<Spill> spill_;
};

// Throws std::system_error (no space on device) when `bytes` surely do not fit beside `path`.
void check_free_space(const std::string& where, const std::filesystem::path& path,
                      std::uint64_t bytes);

// The text of the source's index; empty if it has none.
std::string index_text(const Checkpoint& source);
// other_files() of the source; none of a bare file.
std::vector<std::string> other_files_of(const Checkpoint& source, bool follow_links);
void copy_files(const Checkpoint& source, const std::vector<std::string>& names,
                OutputFolder& output);

}  // namespace hqq
