// diff_checkpoints: two checkpoints, tensor by tensor, as dense values.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "src/format/float_values.hpp"
#include "src/io/block_pool.hpp"
#include "src/io/checkpoint/pipeline.hpp"
#include "src/io/formats/layer_store.hpp"

namespace hqq {
namespace {

// Either a tensor of a file or the dense weight that a quantized layer stands for.
struct DenseTensor {
  std::string name;
  DType dtype = DType::kU8;
  std::vector<std::int64_t> shape;
  std::size_t shard = 0;
  const TensorInfo* info = nullptr;
  const StoredLayer* layer = nullptr;

  std::int64_t numel() const { return checked_numel(shape, "diff"); }
};

class DenseCheckpoint {
 public:
  explicit DenseCheckpoint(const std::filesystem::path& path)
      : checkpoint_(path), layers_(read_stored_layers(checkpoint_)) {
    std::map<const TensorInfo*, const StoredLayer*> layer_of;
    for (const StoredLayer& layer : layers_) {
      for (const StoredField& field : layer.fields) layer_of[field.info] = &layer;
    }
    for (std::size_t s = 0; s < checkpoint_.shard_count(); ++s) {
      for (const TensorInfo& info : checkpoint_.shard(s).tensors()) {
        const auto found = layer_of.find(&info);
        if (found == layer_of.end()) {
          tensors_.push_back({info.name, info.dtype, info.shape, s, &info, nullptr});
        } else if (found->second->fields.front().info == &info) {
          const LayerDescription& layer = found->second->description;
          tensors_.push_back(
              {layer.tensor, DType::kF32, layer.dense_shape(), s, nullptr, found->second});
        }
      }
    }
    for (const DenseTensor& tensor : tensors_) by_name_[tensor.name] = &tensor;
  }

  const std::vector<DenseTensor>& tensors() const { return tensors_; }
  const DenseTensor* find(const std::string& name) const {
    const auto found = by_name_.find(name);
    return found == by_name_.end() ? nullptr : found->second;
  }
  const SafetensorsFile& file(const DenseTensor& tensor) const {
    return checkpoint_.shard(tensor.shard);
  }

 private:
  Checkpoint checkpoint_;
  std::vector<StoredLayer> layers_;
  std::vector<DenseTensor> tensors_;
  std::map<std::string, const DenseTensor*> by_name_;
};

struct Pools {
  BlockPool codes, dense;
};

// Reads the values of a tensor in order, without holding more than one matrix.
class ValueReader {
 public:
  ValueReader(const DenseCheckpoint& checkpoint, const DenseTensor& tensor, Pools& pools,
              int threads)
      : file_(checkpoint.file(tensor)), tensor_(tensor), pools_(pools), threads_(threads) {}

  void next(std::span<double> out) {
    if (tensor_.layer == nullptr) {
      const std::size_t size = dtype_size(tensor_.dtype);
      raw_.resize(out.size() * size);
      file_.read(*tensor_.info, position_ * size, raw_);
      read_values(tensor_.dtype, raw_.data(), out);
      position_ += out.size();
      return;
    }
    const LayerDescription& layer = tensor_.layer->description;
    const auto matrix = static_cast<std::uint64_t>(layer.out_features() * layer.in_features());
    while (!out.empty()) {
      if (position_ % matrix == 0) {
        const auto expert = static_cast<std::int64_t>(position_ / matrix);
        const QuantizedTensor q = read_matrix(*tensor_.layer, expert, false, &pools_.codes);
        if (!dense_) {
          dense_ = pools_.dense.allocate(DType::kF32, {layer.out_features(), layer.in_features()});
        }
        dequantize(q, dense_.buffer.data, {DType::kF32, threads_});
        if (layer.transposed) {
          Tensor stored =
              pools_.dense.allocate(DType::kF32, {layer.in_features(), layer.out_features()});
          transpose_matrix(dense_, stored);
          std::swap(dense_, stored);
        }
      }
      const std::uint64_t at = position_ % matrix;
      const std::size_t count = std::min<std::uint64_t>(out.size(), matrix - at);
      read_values(DType::kF32, dense_.buffer.data + at * sizeof(float), out.first(count));
      out = out.subspan(count);
      position_ += count;
    }
  }

 private:
  const SafetensorsFile& file_;
  const DenseTensor& tensor_;
  Pools& pools_;
  const int threads_;
  std::uint64_t position_ = 0;
  std::vector<std::byte> raw_;
  Tensor dense_;
};

class Comparison {
 public:
  Comparison(const DenseCheckpoint& a, const DenseCheckpoint& b, const CheckpointOptions& options)
      : a_(a), b_(b), options_(options), meter_("diff", total_work(a), options.progress) {}

  std::vector<TensorDiff> run() {
    std::vector<TensorDiff> result;
    for (const DenseTensor& tensor : a_.tensors()) {
      const DenseTensor* other = b_.find(tensor.name);
      if (other == nullptr) {
        result.push_back(only(tensor.name, "only in A"));
        meter_.advance(static_cast<std::uint64_t>(tensor.numel()));
      } else {
        result.push_back(compare(tensor, *other));
      }
    }
    for (const DenseTensor& tensor : b_.tensors()) {
      if (a_.find(tensor.name) == nullptr) result.push_back(only(tensor.name, "only in B"));
    }
    meter_.finish();
    return result;
  }

 private:
  static std::uint64_t total_work(const DenseCheckpoint& a) {
    std::uint64_t total = 0;
    for (const DenseTensor& tensor : a.tensors()) {
      total += static_cast<std::uint64_t>(tensor.numel());
    }
    return total;
  }

  static TensorDiff only(const std::string& name, const std::string& note) {
    TensorDiff diff;
    diff.name = name;
    diff.note = note;
    return diff;
  }

  TensorDiff compare(const DenseTensor& a, const DenseTensor& b) {
    const bool values = is_weight_dtype(a.dtype) && is_weight_dtype(b.dtype);
    std::string note;
    if (a.shape != b.shape) {
      note = "shapes differ: " + shape_string(a.shape) + ", " + shape_string(b.shape);
    } else if (!values && a.dtype != b.dtype) {
      note = "types differ: " + std::string(dtype_name(a.dtype)) + ", " +
             std::string(dtype_name(b.dtype));
    }
    if (!note.empty()) {
      meter_.advance(static_cast<std::uint64_t>(a.numel()));
      return only(a.name, note);
    }
    return values ? compare_values(a, b) : compare_bytes(a, b);
  }

  TensorDiff compare_values(const DenseTensor& a, const DenseTensor& b) {
    ValueReader reader_a(a_, a, pools_, options_.threads);
    ValueReader reader_b(b_, b, pools_, options_.threads);
    const auto count = static_cast<std::uint64_t>(a.numel());
    // No more than there is: a folder may have many thousands of small tensors.
    x_.resize(std::min(kChunk, count));
    y_.resize(x_.size());
    meter_.report(a.name);
    double abs = 0, squares = 0, norm = 0, max = 0;
    bool identical = true;
    for (std::uint64_t done = 0; done < count; done += kChunk) {
      const std::size_t n = std::min<std::uint64_t>(kChunk, count - done);
      reader_a.next(std::span(x_).first(n));
      reader_b.next(std::span(y_).first(n));
      for (std::size_t i = 0; i < n; ++i) {
        // NaN in the same place on both sides is no difference.
        const bool same = x_[i] == y_[i] || (std::isnan(x_[i]) && std::isnan(y_[i]));
        const double error = same ? 0 : std::abs(x_[i] - y_[i]);
        identical = identical && same;
        abs += error;
        squares += error * error;
        norm += x_[i] * x_[i];
        if (!(error <= max)) max = error;
      }
      meter_.advance(n);
      meter_.report(a.name);
    }
    TensorDiff diff;
    diff.name = a.name;
    diff.identical = identical;
    if (count == 0 || identical) return diff;
    diff.mean_abs = abs / static_cast<double>(count);
    diff.rms = std::sqrt(squares / static_cast<double>(count));
    diff.max_abs = max;
    diff.relative = std::sqrt(squares / norm);
    return diff;
  }

  // Integers, booleans and 8-bit floats: equal or not.
  TensorDiff compare_bytes(const DenseTensor& a, const DenseTensor& b) {
    TensorDiff diff;
    diff.name = a.name;
    std::uint64_t different = 0;
    const std::uint64_t size = a.info->nbytes();
    std::vector<std::byte> x(std::min(kCopyChunk, size)), y(x.size());
    meter_.report(a.name);
    for (std::uint64_t done = 0; done < size; done += kCopyChunk) {
      const std::size_t n = std::min(kCopyChunk, size - done);
      a_.file(a).read(*a.info, done, std::span(x).first(n));
      b_.file(b).read(*b.info, done, std::span(y).first(n));
      for (std::size_t i = 0; i < n; ++i) different += x[i] != y[i] ? 1 : 0;
      meter_.report(a.name);
    }
    meter_.advance(static_cast<std::uint64_t>(a.numel()));
    diff.identical = different == 0;
    if (different > 0) {
      diff.note = std::to_string(different) + " of " + std::to_string(size) + " bytes differ (" +
                  std::string(dtype_name(a.dtype)) + ")";
    }
    return diff;
  }

  static constexpr std::uint64_t kChunk = std::uint64_t{1} << 18;

  const DenseCheckpoint& a_;
  const DenseCheckpoint& b_;
  const CheckpointOptions& options_;
  ProgressMeter meter_;
  Pools pools_;
  std::vector<double> x_, y_;
};

}  // namespace

std::vector<TensorDiff> diff_checkpoints(const std::filesystem::path& a,
                                         const std::filesystem::path& b,
                                         const CheckpointOptions& options) {
  const DenseCheckpoint dense_a(a), dense_b(b);
  return Comparison(dense_a, dense_b, options).run();
}

}  // namespace hqq
