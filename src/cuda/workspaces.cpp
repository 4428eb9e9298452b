#include "src/cuda/workspaces.hpp"

#include <algorithm>
#include <bit>
#include <vector>

namespace hqq::cuda {

std::optional<Workspaces::Lease> Workspaces::take(const Place& place, std::size_t bytes) {
  std::unique_lock lock(mutex_);
  const std::pair key(place.device, place.stream);
  if (is_recording(place.stream)) {
    const auto lease = [&](auto& held, const auto& of) -> std::optional<Lease> {
      const auto found = held.find(of);
      if (found == held.end() || found->second.memory.size() < bytes) return std::nullopt;
      Workspace& workspace = found->second;
      workspace.is_recorded = true;
      return Lease(std::move(lock), workspace.memory.data(), workspace.memory.size());
    };
    std::optional<Lease> of_stream = lease(of_streams_, key);
    return of_stream ? std::move(of_stream) : lease(of_graphs_, place.device);
  }
  Workspace& workspace = of_streams_[key];
  if (workspace.memory.size() < bytes) {
    // Doubled: sizes go up with the rows of x, one by one.
    const std::size_t rounded = std::bit_ceil(std::max(bytes, kMinBytes));
    grow(of_graphs_[place.device], rounded, place.stream);
    grow(workspace, rounded, place.stream);
  }
  return Lease(std::move(lock), workspace.memory.data(), workspace.memory.size());
}

void Workspaces::grow(Workspace& workspace, std::size_t bytes, StreamHandle stream) {
  if (workspace.memory.size() >= bytes) return;
  DeviceMemory memory;
  memory.reserve(bytes, "the workspace of linear");
  const std::vector<std::byte> zeros(kCounterBytes);
  check(library().copy(memory.data(), zeros.data(), zeros.size(), stream), "linear");
  check(library().synchronize(stream), "linear");
  if (workspace.is_recorded) retired_.push_back(std::move(workspace.memory));
  workspace.memory = std::move(memory);
  workspace.is_recorded = false;
}

Workspaces& Workspaces::instance() {
  static auto* const workspaces = new Workspaces();
  return *workspaces;
}

}  // namespace hqq::cuda
