// Which links of a checkpoint folder are followed.
#pragma once

#include <filesystem>
#include <string>

namespace hqq {

// Throws FormatError if `real`, the canonical path of `file` (as messages show it), lies outside of
// `folder`. The one exception is the cache of huggingface_hub, whose snapshots/<revision>/ folders
// hold links into ../../blobs/.
void check_link(const std::filesystem::path& folder, const std::filesystem::path& real,
                const std::string& file);

}  // namespace hqq
