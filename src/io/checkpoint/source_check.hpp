// What a source must be before its weights are quantized: the dense model itself. Anything else
// would give a folder that loads and is wrong.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "hqq/checkpoint.hpp"

namespace hqq {

// Opens a checkpoint that will be quantized. One that is quantized already is refused as
// check_dense_source does even if its types are none that a Checkpoint holds.
Checkpoint open_dense_source(const std::filesystem::path& path, bool follow_links = false);

// Throws std::invalid_argument ("[quantize] ...") for an adapter, for weights that are quantized
// already, and for 8-bit float weights without a scale.
void check_dense_source(const Checkpoint& source);

// True for the folder of an adapter, whether or not a model lies in it as well.
bool is_adapter_folder(const std::filesystem::path& folder);

// What a user may not expect, one sentence each: weight files of the folder that are no part of the
// checkpoint, copies of dense weights larger than the result (`result_bytes`), integer weights.
std::vector<std::string> source_warnings(const Checkpoint& source, std::uint64_t result_bytes,
                                         bool follow_links);

}  // namespace hqq
