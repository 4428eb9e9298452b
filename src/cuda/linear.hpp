// y = x W_r^T + bias on a GPU, for one layer or for experts.
#pragma once

#include "cuda/api.hpp"
#include "src/cuda/layer.hpp"

namespace hqq::cuda {

// Bytes from each tensor of a matrix to that of the next, in the order of the file.
using TensorSteps = std::array<std::int64_t, kTensorNames.size()>;

// Arguments for experts of `parts` matrices each, which follow each other in every tensor: those of
// matrix `part` of every expert. x, y and bias are the caller's to set.
LinearArgs experts_args(const Layer& layer, const TensorAddresses& addresses,
                        const TensorSteps& steps, std::int64_t experts, std::int64_t parts,
                        std::int64_t part);

enum class LinearOutcome {
  kDone,
  kNoKernel,     // no kernel of the device takes this layout and type of x
  kNoWorkspace,  // the stream records a graph, and no product before it has left a workspace
};

// Everything of `args` but the workspace is set. Nothing is done but with kDone. Throws CudaError.
LinearOutcome linear(LinearArgs args, const Place& place);

}  // namespace hqq::cuda
