// What a run reads: the other files of a checkpoint folder, and fingerprints that tell whether
// anything changed since an interrupted run.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "hqq/checkpoint.hpp"

namespace hqq {

inline constexpr const char* kIndexName = "model.safetensors.index.json";

// Names of the files in a model folder that belong into every copy of it (tokenizer,
// generation_config, README, subfolders), relative to it with '/', sorted. Left out: the weights
// and their index (rewritten by the caller), config.json (likewise), weights in other formats
// (kOtherWeightFormats), hidden files, and our own manifest.
//
// Throws FormatError for a link to a file elsewhere, unless follow_links, for a link to nothing, a
// pipe or a device, for a subfolder with the name of a file that the caller writes, and for names
// that are no UTF-8.
std::vector<std::string> other_files(const std::filesystem::path& folder, bool follow_links);

// Files named *.safetensors beside the shards that are none of them, sorted: another copy of the
// weights (consolidated.safetensors of Mistral), an adapter, a shard that the index forgot.
std::vector<std::string> stray_weights(const Checkpoint& checkpoint);

// All *.safetensors in a folder (not below it), sorted; the path itself if it is no folder.
std::vector<std::filesystem::path> weight_files(const std::filesystem::path& path);

// The folder of a checkpoint if it was opened as a folder; nullopt for a bare .safetensors file,
// beside which nothing belongs to it.
std::optional<std::filesystem::path> checkpoint_folder(const Checkpoint& checkpoint);

// {"<file>": {"size", "mtime_ns", "header_xxh3" or "xxh3"}} of every file that a run uses. Shards
// are known by their header: hashing their data would take as long as the run itself.
nlohmann::ordered_json fingerprint_source(const Checkpoint& checkpoint, bool follow_links);
// A fingerprint without times, which differ between copies of the same files.
nlohmann::ordered_json without_times(nlohmann::ordered_json fingerprint);
// By which one sees that a file was written to or replaced.
struct FileState {
  std::uint64_t device = 0, inode = 0, size = 0;
  // Nanoseconds since 1970: of the last change to its data, and to the file as a whole, which no
  // copying tool sets back.
  std::int64_t modified = 0, changed = 0;

  // A further link to a file changes the file, but not its data.
  bool has_data_of(const FileState& other) const {
    return device == other.device && inode == other.inode && size == other.size &&
           modified == other.modified;
  }
};
FileState file_state(const std::filesystem::path& path);

// {"size", "xxh3"} of a whole file.
nlohmann::ordered_json fingerprint_file(const std::filesystem::path& path);

// Path of the first value that differs, "config.nbits", and both values; nullopt when they are
// equal.
struct Difference {
  std::string path;
  std::string before;
  std::string now;
};
std::optional<Difference> first_difference(const nlohmann::ordered_json& before,
                                           const nlohmann::ordered_json& now);

}  // namespace hqq
