// What the packings of a matrix share: its tensors are made and checked from a TensorSpecs.
#pragma once

#include <string>
#include <string_view>

#include "hqq/quantized_tensor.hpp"

namespace hqq {

// Allocates the tensors that are present and drops the others.
void allocate_tensors(PackedMatrix& q, const TensorSpecs& specs);

// Gives the tensors that are present their types and shapes, and no memory: for tensors of somebody
// else, whose addresses are put in place before they are read.
void describe_tensors(PackedMatrix& q, const TensorSpecs& specs);

// Throws FormatError naming `where` and the first tensor that does not fit. `kind` comes before its
// name in the message ("the tiled ").
void check_tensors(const PackedMatrix& q, const TensorSpecs& specs, const std::string& where,
                   std::string_view kind = {});

}  // namespace hqq
