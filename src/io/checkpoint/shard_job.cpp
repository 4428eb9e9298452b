#include "src/io/checkpoint/shard_job.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>

#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/io/atomic_file.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;

std::span<const std::byte> bytes_of(const Tensor& tensor) {
  return {tensor.buffer.data, tensor.buffer.size};
}

bool is_copy(const PlannedStep& step) { return step.layer == PlannedStep::kCopy; }

}  // namespace

Spill::Spill(const fs::path& folder) : folder_(folder) {
  // Nobody can see it after unlink, and a killed process leaves nothing behind.
  const fs::path path = folder / ".hqq_cpp.spill.hqq-tmp";
  fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd_ < 0) throw_errno("write", "create", path);
  ::unlink(path.c_str());
}

Spill::~Spill() { ::close(fd_); }

void Spill::write(std::uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::pwrite(fd_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw_errno("write", "write a temporary file in", folder_);
    offset += static_cast<std::uint64_t>(count);
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
}

void Spill::append_to(SafetensorsWriter& writer, std::uint64_t size) {
  std::vector<std::byte> chunk(std::min<std::uint64_t>(size, kCopyChunk));
  for (std::uint64_t offset = 0; offset < size;) {
    const std::size_t wanted = std::min<std::uint64_t>(chunk.size(), size - offset);
    const ssize_t count = ::pread(fd_, chunk.data(), wanted, static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw_errno("write", "read a temporary file in", folder_);
    if (count == 0) throw std::logic_error("[write] a spill file is shorter than what it holds");
    writer.write(std::span(chunk).first(static_cast<std::size_t>(count)));
    offset += static_cast<std::uint64_t>(count);
  }
}

ShardJob::ShardJob(const Checkpoint& source, const std::vector<ShardPlan>& shards,
                   OutputFolder& output)
    : source_(source), shards_(shards), output_(output) {
  for (std::size_t s = 0; s < source.shard_count(); ++s) {
    source_states_.push_back(file_state(source.shard(s).path()));
  }
  std::uint64_t largest = 0;
  for (const ShardPlan& shard : shards) {
    if (output.finished_shard(shard.name) != nullptr) continue;
    steps_.insert(steps_.end(), shard.steps.begin(), shard.steps.end());
    for (const PlannedStep& step : shard.steps) largest = std::max(largest, step.size);
  }
  pool_ = BlockPool(largest);
}

void ShardJob::check_source(const std::string& where) const {
  for (std::size_t s = 0; s < source_.shard_count(); ++s) {
    const fs::path& path = source_.shard(s).path();
    if (file_state(path).has_data_of(source_states_[s])) continue;
    throw_invalid(where,
                  quote_text(path.string()) +
                      " was changed while it was read; start again when nothing writes to it");
  }
}

std::string ShardJob::step_name(std::size_t index) const {
  const PlannedStep& step = steps_[index];
  if (!is_copy(step)) return matrix_name(step);
  return step.source != nullptr ? step.source->name : shards_[step.shard].name;
}

std::uint64_t ShardJob::input_bytes(std::size_t index) const {
  const PlannedStep& step = steps_[index];
  return is_copy(step) ? step.size : matrix_input_bytes(step);
}

std::uint64_t ShardJob::output_bytes(std::size_t index) const {
  const PlannedStep& step = steps_[index];
  return is_copy(step) ? 0 : matrix_output_bytes(step);
}

std::uint64_t ShardJob::step_work(std::size_t index) const {
  const PlannedStep& step = steps_[index];
  return is_copy(step) ? 0 : matrix_weights(step);
}

std::vector<Tensor> ShardJob::read(std::size_t index) {
  const PlannedStep& step = steps_[index];
  if (!is_copy(step)) return read_step(step);
  if (step.size == 0) return {};
  Tensor piece = pool_.allocate(DType::kU8, {static_cast<std::int64_t>(step.size)});
  source_file(step).read(*step.source, step.offset, {piece.buffer.data, piece.buffer.size});
  return {piece};
}

std::vector<Tensor> ShardJob::compute(std::size_t index, std::vector<Tensor> input) {
  const PlannedStep& step = steps_[index];
  return is_copy(step) ? std::move(input) : compute_step(step, std::move(input));
}

void ShardJob::write(std::size_t index, std::vector<Tensor> output) {
  const PlannedStep& step = steps_[index];
  const ShardPlan& shard = shards_[step.shard];
  if (!writer_) {
    writer_ = std::make_unique<SafetensorsWriter>(output_.path() / shard.name, shard.tensors,
                                                  shard.metadata);
  }
  if (is_copy(step)) {
    for (const Tensor& piece : output) writer_->write(bytes_of(piece));
  } else {
    write_matrix(step, output);
  }
  if (!step.last_of_shard) return;
  writer_->finish();
  FileRecord record{writer_->file_size(), writer_->file_hash()};
  writer_.reset();
  output_.shard_finished(shard.name, std::move(record), journal_extra(step.shard));
}

void ShardJob::write_matrix(const PlannedStep& step, const std::vector<Tensor>& output) {
  const std::int64_t count = experts(step);
  if (count == 1 || output.size() == 1) {
    for (const Tensor& tensor : output) writer_->write(bytes_of(tensor));
    return;
  }
  writer_->write(bytes_of(output[0]));
  if (step.expert == 0) spill_ = std::make_unique<Spill>(output_.path());
  // Behind each other in the spill, as later in the file: all experts of one tensor, then the next.
  std::uint64_t base = 0;
  for (std::size_t i = 1; i < output.size(); ++i) {
    const std::uint64_t size = output[i].nbytes();
    spill_->write(base + size * static_cast<std::uint64_t>(step.expert), bytes_of(output[i]));
    base += size * static_cast<std::uint64_t>(count);
  }
  if (step.expert + 1 < count) return;
  spill_->append_to(*writer_, base);
  spill_.reset();
}

void check_free_space(const std::string& where, const fs::path& path, std::uint64_t bytes) {
  fs::path folder = fs::absolute(path).parent_path();
  while (!fs::exists(folder)) folder = folder.parent_path();
  std::error_code error;
  const fs::space_info space = fs::space(folder, error);
  // Some file systems report nothing; then writing tells.
  if (error || space.capacity == 0 || space.available >= bytes) return;
  throw std::system_error(std::make_error_code(std::errc::no_space_on_device),
                          "[" + where + "] the result needs " + std::to_string(bytes) +
                              " bytes, but only " + std::to_string(space.available) +
                              " are free in " + quote_text(folder.string()));
}

std::string index_text(const Checkpoint& source) {
  if (!source.is_sharded()) return "";
  return read_text_file(source.path() / "model.safetensors.index.json");
}

std::vector<std::string> other_files_of(const Checkpoint& source, bool follow_links) {
  const auto folder = checkpoint_folder(source);
  return folder ? other_files(*folder, follow_links) : std::vector<std::string>();
}

void copy_files(const Checkpoint& source, const std::vector<std::string>& names,
                OutputFolder& output) {
  for (const std::string& name : names) output.copy_file(source.path() / name, name);
}

}  // namespace hqq
