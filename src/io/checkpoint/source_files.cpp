#include "src/io/checkpoint/source_files.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <set>

#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/io/atomic_file.hpp"
#include "src/io/links.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

// Weights of the same model once more, of no use beside quantized ones; most are larger than the
// result.
constexpr std::array kOtherWeightFormats = {
    ".bin",  ".pt",        ".pth",     ".ckpt",   ".pkl",  ".gguf", ".ggml", ".h5",
    ".onnx", ".onnx_data", ".msgpack", ".tflite", ".nemo", ".pte",  ".ot",   ".mlmodel"};

bool ends_with_any_weight_format(const std::string& name) {
  return std::any_of(kOtherWeightFormats.begin(), kOtherWeightFormats.end(),
                     [&](const char* suffix) { return name.ends_with(suffix); });
}

bool belongs_in_copy(const std::string& name, bool top_level) {
  if (name.starts_with('.') || ends_with_any_weight_format(name)) return false;
  // Also the index files of other formats.
  if (name.ends_with(".index.json")) return false;
  if (!top_level) return true;
  // In subfolders safetensors are parts of their own (sentence-transformers' 2_Dense); beside the
  // shards they are another copy of the weights.
  return name != "config.json" && !name.ends_with(".safetensors") && !name.starts_with("hqq_cpp.");
}

// The files of a folder that belong into every copy.
class Collector {
 public:
  Collector(const fs::path& root, bool follow_links) : root_(root), follow_links_(follow_links) {}

  std::vector<std::string> run() {
    collect(root_, "");
    std::sort(names_.begin(), names_.end());
    return std::move(names_);
  }

 private:
  void collect(const fs::path& folder, const std::string& prefix) {
    for (const auto& entry : fs::directory_iterator(folder)) {
      const std::string name = entry.path().filename().string();
      // Links to files are how caches store models; links to folders may lead in circles.
      if (entry.is_directory()) {
        if (entry.is_symlink() || name.starts_with('.')) continue;
        if (prefix.empty()) check_folder_name(name);
        collect(entry.path(), prefix + name + "/");
      } else if (entry.is_regular_file()) {
        const bool copied = belongs_in_copy(name, prefix.empty());
        // The caller writes edited copies of config.json and the index.
        const bool edited = prefix.empty() && (name == "config.json" || name == kIndexName);
        if ((copied || edited) && entry.is_symlink() && !follow_links_) {
          check_link(root_, fs::canonical(entry.path()), quote_text(entry.path().string()));
        }
        if (copied) names_.push_back(prefix + name);
      } else if (belongs_in_copy(name, prefix.empty())) {
        refuse(entry);
      }
    }
  }

  // A copy without it would lack a file that is there by name.
  [[noreturn]] static void refuse(const fs::directory_entry& entry) {
    const char* what = entry.is_symlink() && !entry.exists()
                           ? " is a link to a file that is not there"
                           : " is neither a file nor a folder (a pipe, a socket or a device)";
    throw_format("checkpoint", quote_text(entry.path().string()) + what +
                                   ", so it cannot be copied; remove or replace it");
  }

  // Before any work: the result has files of these names.
  void check_folder_name(const std::string& name) const {
    if (name != "config.json" && !name.ends_with(".safetensors") &&
        !name.ends_with(".safetensors.index.json") && !name.starts_with("hqq_cpp.")) {
      return;
    }
    throw_format("checkpoint", quote_text(root_.string()) + " has a folder " + quote_text(name) +
                                   ", which is the name of a file of a checkpoint; rename it");
  }

  const fs::path root_;
  const bool follow_links_;
  std::vector<std::string> names_;
};

std::int64_t modification_time(const fs::path& path) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             fs::last_write_time(path).time_since_epoch())
      .count();
}

// Hash of the first `size` bytes; the file is known to be that long.
std::string hash_start(const fs::path& path, std::uint64_t size) {
  std::uint64_t file_size = 0;
  const int fd = open_regular_file(path, file_size);
  Xxh3Stream hash;
  std::vector<std::byte> chunk(std::size_t{1} << 20);
  ssize_t count = 1;
  while (size > 0 && count > 0) {
    count = ::read(fd, chunk.data(), std::min<std::uint64_t>(size, chunk.size()));
    if (count < 0 && errno == EINTR) {
      count = 1;
      continue;
    }
    if (count > 0) {
      hash.update(std::span(chunk).first(static_cast<std::size_t>(count)));
      size -= static_cast<std::uint64_t>(count);
    }
  }
  const int error = count < 0 ? errno : 0;
  ::close(fd);
  errno = error;
  if (error != 0) throw_errno("read", "read", path);
  return hash.hex();
}

Json fingerprint_shard(const SafetensorsFile& file) {
  std::uint64_t data = 0;
  for (const TensorInfo& info : file.tensors()) data = std::max(data, info.end);
  Json json;
  json["size"] = file.file_size();
  json["header_xxh3"] = hash_start(file.path(), file.file_size() - data);
  json["mtime_ns"] = modification_time(file.path());
  return json;
}

std::string shown(const Json& value) { return cut_text(value.dump(), 100); }

void check_listable(const std::string& name, const fs::path& folder) {
  if (is_utf8(name)) return;
  throw_format("checkpoint", "the name of file " + quote_text(name) + " in " +
                                 quote_text(folder.string()) +
                                 " is not UTF-8, so no manifest can list it");
}

}  // namespace

std::vector<std::string> other_files(const fs::path& folder, bool follow_links) {
  std::vector<std::string> names = Collector(folder, follow_links).run();
  for (const std::string& name : names) check_listable(name, folder);
  return names;
}

std::vector<fs::path> weight_files(const fs::path& path) {
  if (!fs::is_directory(path)) return {path};
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(path)) {
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

std::vector<std::string> stray_weights(const Checkpoint& checkpoint) {
  std::vector<std::string> stray;
  for (const fs::path& file : weight_files(checkpoint.path())) {
    const std::string name = file.filename().string();
    const auto& shards = checkpoint.shard_names();
    const bool is_shard = std::find(shards.begin(), shards.end(), name) != shards.end();
    if (!is_shard && fs::is_regular_file(file)) stray.push_back(name);
  }
  return stray;
}

std::optional<fs::path> checkpoint_folder(const Checkpoint& checkpoint) {
  if (!fs::is_directory(checkpoint.path())) return std::nullopt;
  return checkpoint.path();
}

FileState file_state(const fs::path& path) {
  struct stat status;
  if (::stat(path.c_str(), &status) != 0) throw_errno("read", "look at", path);
  const auto nanoseconds = [](const timespec& time) {
    return std::int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
  };
#if defined(__APPLE__)
  const timespec &modified = status.st_mtimespec, &changed = status.st_ctimespec;
#else
  const timespec &modified = status.st_mtim, &changed = status.st_ctim;
#endif
  return {static_cast<std::uint64_t>(status.st_dev), static_cast<std::uint64_t>(status.st_ino),
          static_cast<std::uint64_t>(status.st_size), nanoseconds(modified), nanoseconds(changed)};
}

Json fingerprint_file(const fs::path& path) {
  Json json;
  json["size"] = fs::file_size(path);
  json["xxh3"] = hash_file(path);
  return json;
}

Json fingerprint_source(const Checkpoint& checkpoint, bool follow_links) {
  Json files = Json::object();
  for (std::size_t i = 0; i < checkpoint.shard_count(); ++i) {
    const std::string& name = checkpoint.shard_names()[i];
    check_listable(name, checkpoint.shard(i).path().parent_path());
    files[name] = fingerprint_shard(checkpoint.shard(i));
  }
  if (!checkpoint.config_json().empty()) {
    const std::string& text = checkpoint.config_json();
    files["config.json"] = {{"size", text.size()},
                            {"xxh3", xxh3_hex(std::as_bytes(std::span(text)))}};
  }
  if (const auto folder = checkpoint_folder(checkpoint)) {
    for (const std::string& name : other_files(*folder, follow_links)) {
      files[name] = fingerprint_file(*folder / name);
    }
  }
  return files;
}

Json without_times(Json fingerprint) {
  for (Json& file : fingerprint) file.erase("mtime_ns");
  return fingerprint;
}

std::optional<Difference> first_difference(const Json& before, const Json& now) {
  if (before.is_object() && now.is_object()) {
    std::vector<std::string> keys;
    for (const auto& [key, value] : before.items()) keys.push_back(key);
    for (const auto& [key, value] : now.items()) {
      if (!before.contains(key)) keys.push_back(key);
    }
    for (const std::string& key : keys) {
      const auto value_of = [&](const Json& json) {
        return json.contains(key) ? json.at(key) : Json();
      };
      if (!before.contains(key) || !now.contains(key)) {
        return Difference{key, before.contains(key) ? shown(value_of(before)) : "absent",
                          now.contains(key) ? shown(value_of(now)) : "absent"};
      }
      auto difference = first_difference(before.at(key), now.at(key));
      if (!difference) continue;
      difference->path = difference->path.empty() ? key : key + "." + difference->path;
      return difference;
    }
    // The order of rules counts: the first pattern that matches wins.
    std::string names_before, names_now;
    for (const auto& [key, value] : before.items()) names_before += key + " ";
    for (const auto& [key, value] : now.items()) names_now += key + " ";
    if (names_before == names_now) return std::nullopt;
    return Difference{"order of keys", shown(names_before), shown(names_now)};
  }
  if (before == now) return std::nullopt;
  return Difference{"", shown(before), shown(now)};
}

}  // namespace hqq
