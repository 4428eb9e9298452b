// Which links of a checkpoint folder are followed.
#pragma once

#include <filesystem>

namespace hqq {

// What a refusal of a link ends with.
inline constexpr const char* kLinkHelp =
    "; put the file itself there, or ask for links to be followed (--follow-links, follow_links in "
    "Python)";

// Whether `real`, the canonical path of a file that is reached through `folder`, lies elsewhere. The
// one exception is the cache of huggingface_hub, whose snapshots/<revision>/ folders hold links into
// ../../blobs/.
bool leaves_folder(const std::filesystem::path& folder, const std::filesystem::path& real);

}  // namespace hqq
