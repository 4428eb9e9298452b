// Scratch memory of products on a GPU, which outlives the call.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "src/cuda/handles.hpp"
#include "src/cuda/layer.hpp"

namespace hqq::cuda {

// One workspace for each device and stream, since products on one stream do not overlap. The
// counters at its start are zero between calls. A second one for each device is for graphs that are
// recorded on a stream without a workspace: torch.cuda.graph() makes a stream of its own, and
// nothing can be allocated while it records. A workspace whose address a graph may hold is never
// freed.
class Workspaces {
 public:
  static constexpr std::size_t kMinBytes = std::size_t{16} << 20;

  // Memory for the calls that are launched while this object lives: another thread that uses the
  // same stream waits, since a product may be two launches with the workspace between them.
  class Lease {
   public:
    Lease(std::unique_lock<std::mutex> lock, void* memory, std::size_t bytes)
        : lock_(std::move(lock)), memory_(memory), bytes_(bytes) {}
    void* memory() const { return memory_; }
    std::size_t bytes() const { return bytes_; }

   private:
    std::unique_lock<std::mutex> lock_;
    void* memory_;
    std::size_t bytes_;
  };

  // At least `bytes` on the current device, which is place.device. nullopt: the stream records a
  // graph, and no product before it has left a workspace that is large enough. Throws CudaError.
  std::optional<Lease> take(const Place& place, std::size_t bytes);

  // The workspaces of the process. They are not destroyed: the driver may be gone before static
  // objects are.
  static Workspaces& instance();

 private:
  struct Workspace {
    DeviceMemory memory;
    bool is_recorded = false;  // a graph may hold its address
  };

  void grow(Workspace& workspace, std::size_t bytes, StreamHandle stream);

  std::mutex mutex_;
  std::map<std::pair<int, StreamHandle>, Workspace> of_streams_;
  std::map<int, Workspace> of_graphs_;
  // Smaller ones of before whose addresses graphs may hold.
  std::vector<DeviceMemory> retired_;
};

}  // namespace hqq::cuda
