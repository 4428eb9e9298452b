#include "src/io/checkpoint/finished_folder.hpp"

#include <algorithm>
#include <string>

#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/io/atomic_file.hpp"
#include "src/io/checkpoint/manifest.hpp"
#include "src/io/checkpoint/pipeline.hpp"
#include "src/io/checkpoint/source_files.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;

constexpr const char* kResumeWhere = "resume";

void check_source(const fs::path& folder, const fs::path& source, const Manifest& manifest) {
  const std::int64_t written = file_state(folder / kManifestName).modified;
  for (const auto& [name, record] : manifest.source.items()) {
    if (!record.contains("header_xxh3")) continue;  // other files are compared by their contents
    const fs::path shard = fs::is_directory(source) ? source / name : source;
    const FileState now = file_state(shard);
    if (std::max(now.modified, now.changed) <= written) continue;
    throw_invalid(kResumeWhere,
                  quote_text(shard.string()) + " was changed, or copied to where it is, after " +
                      quote_text(folder.string()) +
                      " was written; use force instead of resume to quantize it again");
  }
}

}  // namespace

bool is_result_of(const fs::path& folder, const nlohmann::ordered_json& request) {
  if (request.is_null() || !fs::exists(folder / kManifestName)) return false;
  try {
    const Manifest manifest = read_manifest(folder);
    return request.at("version").get_ref<const std::string&>() == manifest.version &&
           manifest.config == request.at("config") &&
           manifest.importance == request.at("importance") &&
           manifest.source == without_times(request.at("source"));
  } catch (const FormatError&) {
    return false;
  }
}

void check_finished(const fs::path& folder, const fs::path& source,
                    const ProgressCallback& progress) {
  const Manifest manifest = read_manifest(folder);
  check_source(folder, source, manifest);
  std::uint64_t total = 0;
  for (const auto& [name, record] : manifest.files) total += record.size;
  ProgressMeter meter(kResumeWhere, total, progress);
  for (const auto& [name, record] : manifest.files) {
    const fs::path file = folder / name;
    std::string problem;
    if (!fs::is_regular_file(file)) {
      problem = "is missing";
    } else if (const std::uint64_t size = fs::file_size(file); size != record.size) {
      problem = "has " + std::to_string(size) + " bytes instead of " + std::to_string(record.size);
    } else {
      const std::string hash = hash_file(file, [&, &name = name](std::uint64_t bytes) {
        meter.advance(bytes);
        meter.report(name);
      });
      if (hash != record.xxh3_128) problem = "was changed";
    }
    if (problem.empty()) continue;
    throw_invalid(kResumeWhere, quote_text(folder.string()) +
                                    " is complete but damaged: " + quote_text(name) + " " +
                                    problem + "; use force instead of resume to start over");
  }
}

}  // namespace hqq
