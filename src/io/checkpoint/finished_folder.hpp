// What `resume` finds where the destination is there already.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>

#include "hqq/checkpoint.hpp"

namespace hqq {

// Whether a folder is the result of a run with this request: version, settings, importance, and a
// source whose files have the sizes and hashes that the manifest records.
bool is_result_of(const std::filesystem::path& folder, const nlohmann::ordered_json& request);

// Throws std::invalid_argument, naming the file, unless the folder holds what its manifest says, to
// the last bit, and no shard of the source was written to after the folder was. (A manifest knows
// shards by their headers, which weights of another training step share.)
void check_finished(const std::filesystem::path& folder, const std::filesystem::path& source,
                    const ProgressCallback& progress);

}  // namespace hqq
