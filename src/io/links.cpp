#include "src/io/links.hpp"

#include <algorithm>

#include "hqq/error.hpp"
#include "src/base/quoted_text.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;

bool is_below(const fs::path& path, const fs::path& folder) {
  return std::mismatch(folder.begin(), folder.end(), path.begin(), path.end()).first ==
         folder.end();
}

bool leaves_folder(const fs::path& folder, const fs::path& real) {
  const fs::path real_folder = fs::canonical(folder);
  if (is_below(real, real_folder)) return false;
  for (fs::path at = real_folder; at.has_relative_path(); at = at.parent_path()) {
    const fs::path snapshots = at.parent_path();
    if (snapshots.filename() == "snapshots") {
      return real.parent_path() != snapshots.parent_path() / "blobs";
    }
  }
  return true;
}

}  // namespace

void check_link(const fs::path& folder, const fs::path& real, const std::string& file) {
  if (!leaves_folder(folder, real)) return;
  throw_format("checkpoint", file + " is a link that leaves the folder, to " +
                                 quote_text(real.string()) +
                                 "; put the file itself there, or ask for links to be followed "
                                 "(--follow-links, follow_links in Python)");
}

}  // namespace hqq
