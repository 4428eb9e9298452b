// hqq::cuda::quantize: a matrix in host memory, solved on a GPU.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "src/backend.hpp"
#include "src/cuda/handles.hpp"
#include "src/cuda/layer.hpp"
#include "src/cuda/solve.hpp"
#include "src/quantize/solve_params.hpp"

namespace hqq::cuda {
namespace {

// A piece of the pinned memory that W passes through: one is filled while the other is copied.
constexpr std::size_t kStageBytes = std::size_t{8} << 20;

// Memory and streams of one call at a time.
struct Lane {
  DeviceMemory device;
  struct Stage {
    PinnedMemory memory;
    Stream stream;
  };
  Stage stages[2];
  Stream stream;
};

// The lanes of a device that nobody uses now.
class Lanes {
 public:
  explicit Lanes(int device) : device_(device) {}

  std::unique_ptr<Lane> take() {
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        std::unique_ptr<Lane> lane = std::move(idle_.back());
        idle_.pop_back();
        return lane;
      }
    }
    const CurrentDevice current(device_);
    return std::make_unique<Lane>();
  }
  void give_back(std::unique_ptr<Lane> lane) {
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(lane));
  }

 private:
  int device_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Lane>> idle_;
};

std::shared_ptr<Lanes> lanes_of(int device) {
  static std::mutex mutex;
  static std::map<int, std::weak_ptr<Lanes>> all;
  const std::lock_guard lock(mutex);
  std::shared_ptr<Lanes> lanes = all[device].lock();
  if (!lanes) all[device] = lanes = std::make_shared<Lanes>(device);
  return lanes;
}

// Copies rows of W to device memory, one behind the other.
class Upload {
 public:
  Upload(Lane& lane, const std::string& what) : lane_(lane), what_(what) {}

  void rows(const TensorView& W, std::byte* to) {
    const std::size_t row_bytes = static_cast<std::size_t>(W.cols) * dtype_size(W.dtype);
    const std::size_t stride = static_cast<std::size_t>(W.row_stride) * dtype_size(W.dtype);
    const auto* from = static_cast<const std::byte*>(W.data);
    const auto rows = static_cast<std::size_t>(W.rows);
    if (stride == row_bytes) {
      bytes(from, to, rows * row_bytes);
    } else {
      for (std::size_t r = 0; r < rows; ++r) {
        bytes(from + r * stride, to + r * row_bytes, row_bytes);
      }
    }
    finish();
  }

 private:
  void bytes(const std::byte* from, std::byte* to, std::size_t size) {
    while (size > 0) {
      if (used_ == kStageBytes || (used_ > 0 && to != start_ + used_)) flush();
      const std::size_t count = std::min(size, kStageBytes - used_);
      if (used_ == 0) {
        start_ = to;
        // What this piece held before may still be on its way.
        stage().stream.synchronize(what_);
      }
      std::memcpy(stage().memory.reserve(kStageBytes, what_) + used_, from, count);
      used_ += count;
      from += count;
      to += count;
      size -= count;
    }
  }

  void flush() {
    if (used_ == 0) return;
    check(library().copy(start_, stage().memory.reserve(kStageBytes, what_), used_,
                         stage().stream.get()),
          what_);
    used_ = 0;
    current_ = 1 - current_;
  }

  void finish() {
    flush();
    for (const Lane::Stage& stage : lane_.stages) stage.stream.synchronize(what_);
  }

  Lane::Stage& stage() { return lane_.stages[current_]; }

  Lane& lane_;
  const std::string& what_;
  int current_ = 0;
  std::size_t used_ = 0;        // of the current piece
  std::byte* start_ = nullptr;  // where it goes
};

void quantize_in(Lane& lane, const QuantizeTask& task, QuantizedTensor& out) {
  const std::string what = task.name + " on cuda:" + std::to_string(task.device);
  // Device memory of a call: W, the result, importance, and what the solver needs.
  Places places;
  const std::size_t W_bytes = static_cast<std::size_t>(task.W.numel()) * dtype_size(task.W.dtype);
  const std::size_t W_at = places.add(W_bytes);
  const std::vector<float> importance =
      task.importance.empty() ? std::vector<float>() : relative_importance(task.importance);
  const std::size_t importance_at = places.add(importance.size() * sizeof(float));
  std::vector<std::pair<Tensor*, std::size_t>> tensors;
  for (auto& [name, tensor] : out.fields()) {
    tensors.emplace_back(tensor, *tensor ? places.add(tensor->nbytes()) : 0);
  }

  // Where everything lies follows from sizes, and the size of the workspace from the task.
  const auto describe_task = [&](std::byte* base) {
    DeviceTask device;
    device.W = TensorView(base + W_at, task.W.dtype, task.W.rows, task.W.cols);
    device.config = task.config;
    if (!importance.empty()) device.importance = reinterpret_cast<float*>(base + importance_at);
    TensorAddresses addresses{};
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (!*tensors[i].first) continue;
      addresses[i] = reinterpret_cast<std::uintptr_t>(base + tensors[i].second);
    }
    device.out = device_matrix(out, addresses);
    device.name = task.name;
    device.stats = task.stats;
    return device;
  };
  const std::size_t workspace_bytes = solve_workspace_bytes(describe_task(nullptr));
  const std::size_t workspace_at = places.add(workspace_bytes);

  std::byte* base = lane.device.reserve(places.size, what);
  const Api& api = library();
  const StreamHandle stream = lane.stream.get();
  Upload(lane, what).rows(task.W, base + W_at);
  if (!importance.empty()) {
    check(api.copy(base + importance_at, importance.data(), importance.size() * sizeof(float),
                   stream),
          what);
  }
  solve(describe_task(base), base + workspace_at, workspace_bytes, stream);
  for (const auto& [tensor, offset] : tensors) {
    if (!*tensor) continue;
    check(api.copy(tensor->buffer.data, base + offset, tensor->nbytes(), stream), what);
  }
  lane.stream.synchronize(what);
}

}  // namespace

std::shared_ptr<void> keep_memory(int device) {
  require_device(device);
  return lanes_of(device);
}

void quantize(const QuantizeTask& task, QuantizedTensor& out) {
  const std::shared_ptr<Lanes> lanes = lanes_of(task.device);
  std::unique_ptr<Lane> lane = lanes->take();
  const CurrentDevice current(task.device);
  // A lane of a call that failed may still be at work: it is not given back.
  quantize_in(*lane, task, out);
  lanes->give_back(std::move(lane));
}

}  // namespace hqq::cuda
