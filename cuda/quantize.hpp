// Quantizing on the GPU: the order of work of docs/solver.md.
#pragma once

#include <cstddef>

#include "cuda/api.hpp"

namespace hqq::cuda {

std::size_t quantize_workspace_bytes(const QuantizeArgs& args);
// Bit for bit what the CPU backend computes. Launches only: what is wrong with W is in
// args.problems when the stream has come that far.
void quantize(const QuantizeArgs& args, StreamHandle stream);

}  // namespace hqq::cuda
