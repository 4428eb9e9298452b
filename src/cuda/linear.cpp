#include "src/cuda/linear.hpp"

#include "src/cuda/workspaces.hpp"

namespace hqq::cuda {

LinearArgs experts_args(const Layer& layer, const TensorAddresses& addresses,
                        const TensorSteps& steps, std::int64_t experts, std::int64_t parts,
                        std::int64_t part) {
  TensorAddresses first = addresses;
  for (std::size_t i = 0; i < first.size(); ++i) {
    if (first[i] != 0) first[i] += static_cast<std::uintptr_t>(part * steps[i]);
  }
  LinearArgs args;
  args.weight = layer.matrix(first);
  args.experts = experts;
  static_assert(kTensorNames.size() == sizeof(ExpertStrides) / sizeof(std::int64_t));
  args.strides = {parts * steps[0], parts * steps[1], parts * steps[2], parts * steps[3],
                  parts * steps[4], parts * steps[5], parts * steps[6], parts * steps[7]};
  return args;
}

LinearOutcome linear(LinearArgs args, const Place& place) {
  if (args.rows == 0) return LinearOutcome::kDone;
  const CurrentDevice current(place.device);
  const Api& api = library();
  std::size_t bytes = 0;
  Status status = api.linear_workspace_bytes(args, &bytes);
  if (status == Status::kOk) {
    const auto workspace = Workspaces::instance().take(place, bytes);
    if (!workspace) return LinearOutcome::kNoWorkspace;
    args.workspace = workspace->memory();
    args.workspace_bytes = workspace->bytes();
    status = api.linear(args, place.stream);
  }
  if (status == Status::kUnsupported) return LinearOutcome::kNoKernel;
  check(status, "linear");
  return LinearOutcome::kDone;
}

}  // namespace hqq::cuda
