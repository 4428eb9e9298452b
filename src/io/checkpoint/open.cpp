// class Checkpoint: finds, opens and checks the files of a checkpoint folder.
#include <algorithm>
#include <set>
#include <system_error>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/io/atomic_file.hpp"
#include "src/io/checkpoint/source_check.hpp"
#include "src/io/checkpoint/source_files.hpp"
#include "src/io/links.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;
constexpr const char* kCheckpointWhere = "checkpoint";
constexpr const char* kSingleName = "model.safetensors";

// Tensor -> shard, as the index says.
using WeightMap = std::map<std::string, std::string>;
// Tensor -> number of its shard, and its own number in there.
using TensorPlaces = std::map<std::string, std::pair<std::size_t, std::size_t>>;

[[noreturn]] void throw_system(const std::error_code& error, const std::string& action,
                               const fs::path& path) {
  throw std::system_error(error, "[checkpoint] cannot " + action + " " + quote_text(path.string()));
}

// True also for a dangling link, so that opening it reports the link instead of passing over it.
bool has_entry(const fs::path& path) {
  std::error_code error;
  const fs::file_status status = fs::symlink_status(path, error);
  if (status.type() == fs::file_type::none) throw_system(error, "open", path);
  return fs::exists(status);
}

// Names in the index are file names, never paths: whatever they say, no other folder is read.
void check_shard_name(const std::string& index, const std::string& tensor,
                      const std::string& shard) {
  const std::string entry =
      index + ": tensor " + quote_text(tensor) + " is in shard " + quote_text(shard);
  if (shard.empty()) throw_format(kCheckpointWhere, entry + ", but the name is empty");
  // A NUL would end the name early inside the system call.
  if (std::any_of(shard.begin(), shard.end(), [](char c) { return c >= 0 && c < 0x20; })) {
    throw_format(kCheckpointWhere, entry + ", but control characters are not allowed");
  }
  if (shard.front() == '/' || shard.front() == '\\' || (shard.size() > 1 && shard[1] == ':')) {
    throw_format(kCheckpointWhere, entry + ", but an absolute path is not allowed");
  }
  if (shard == "." || shard == ".." || shard.starts_with("../") || shard.starts_with("..\\") ||
      shard.find("/..") != std::string::npos || shard.find("\\..") != std::string::npos) {
    throw_format(kCheckpointWhere, entry + ", but the path leaves the folder");
  }
  if (shard.find_first_of("/\\") != std::string::npos) {
    throw_format(kCheckpointWhere,
                 entry + ", but shards must lie in the folder of the index itself");
  }
  if (!shard.ends_with(".safetensors")) {
    throw_format(kCheckpointWhere, entry + ", but a name ending in .safetensors is needed");
  }
}

// A link may not smuggle in a file from elsewhere.
void check_shard(const fs::path& folder, const std::string& shard, bool follow_links) {
  std::error_code error;
  const fs::path real = fs::canonical(folder / shard, error);
  if (error && error != std::errc::no_such_file_or_directory) {
    throw_system(error, "open", folder / shard);
  }
  if (error) {
    throw_format(kCheckpointWhere, quote_text(folder.string()) + ": shard " + quote_text(shard) +
                                       ", which the index lists, is missing");
  }
  if (!follow_links) {
    check_link(folder, real, quote_text(folder.string()) + ": shard " + quote_text(shard));
  }
}

WeightMap read_index(const fs::path& path) {
  const std::string index = quote_text(path.string());
  const auto json =
      parse_python_json(read_text_file(path), std::string(kCheckpointWhere) + " " + index);
  if (!json.is_object())
    throw_format(kCheckpointWhere, index + ": the index must be a JSON object");
  const auto map = json.find("weight_map");
  if (map == json.end()) throw_format(kCheckpointWhere, index + ": the index has no weight_map");
  if (!map->is_object()) {
    throw_format(kCheckpointWhere,
                 index + ": weight_map must be an object, but it is " + map->type_name());
  }
  if (map->empty()) throw_format(kCheckpointWhere, index + ": weight_map lists no tensor");
  WeightMap result;
  for (const auto& [tensor, shard] : map->items()) {
    if (!shard.is_string()) {
      throw_format(kCheckpointWhere, index + ": the shard of tensor " + quote_text(tensor) +
                                         " must be a string, but it is " + shard.type_name());
    }
    check_shard_name(index, tensor, shard.get_ref<const std::string&>());
    result.emplace(tensor, shard.get<std::string>());
  }
  return result;
}

[[noreturn]] void throw_no_model(const fs::path& folder) {
  if (is_adapter_folder(folder)) {
    throw_format(kCheckpointWhere,
                 quote_text(folder.string()) +
                     " holds an adapter (adapter_config.json) and no model; merge it into "
                     "its base model first");
  }
  std::string found;
  int count = 0;
  std::error_code error;
  fs::directory_iterator entries(folder, error);
  if (error) throw_system(error, "list", folder);
  for (const auto& entry : entries) {
    const std::string name = entry.path().filename().string();
    const bool other = name.ends_with(".safetensors") || name.ends_with(".bin") ||
                       name.ends_with(".pt") || name.ends_with(".gguf");
    if (other && ++count <= 3) found += (count == 1 ? "; it has " : ", ") + quote_text(name);
  }
  throw_format(kCheckpointWhere, quote_text(folder.string()) + " has neither " + kSingleName +
                                     " nor " + kIndexName + found);
}

std::string read_config(const fs::path& path) {
  if (!has_entry(path)) return {};
  std::string text = read_text_file(path, kMaxConfigBytes);
  const std::string file = quote_text(path.string());
  if (!parse_python_json(text, std::string(kCheckpointWhere) + " " + file).is_object()) {
    throw_format(kCheckpointWhere, file + ": config.json must hold a JSON object");
  }
  return text;
}

// Index and shards must agree on every tensor, in both directions.
void check_index(const fs::path& folder, const WeightMap& weight_map,
                 const std::vector<std::string>& shard_names, const TensorPlaces& places) {
  for (const auto& [tensor, shard] : weight_map) {
    const auto place = places.find(tensor);
    if (place == places.end()) {
      throw_format(kCheckpointWhere, quote_text(folder.string()) + ": the index puts tensor " +
                                         quote_text(tensor) + " into " + quote_text(shard) +
                                         ", but no shard holds it");
    }
    const std::string& real = shard_names[place->second.first];
    if (real != shard) {
      throw_format(kCheckpointWhere, quote_text(folder.string()) + ": the index puts tensor " +
                                         quote_text(tensor) + " into " + quote_text(shard) +
                                         ", but it is in " + quote_text(real));
    }
  }
  for (const auto& [tensor, place] : places) {
    if (!weight_map.contains(tensor)) {
      throw_format(kCheckpointWhere, quote_text(folder.string()) + ": shard " +
                                         quote_text(shard_names[place.first]) + " holds tensor " +
                                         quote_text(tensor) + ", which the index does not list");
    }
  }
}

}  // namespace

Checkpoint::Checkpoint(const fs::path& path, bool follow_links) : path_(path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) {
    if (!error) error = std::make_error_code(std::errc::no_such_file_or_directory);
    throw_system(error, "open", path);
  }
  fs::path folder = path;
  WeightMap weight_map;
  if (!fs::is_directory(status)) {
    if (path.extension() != ".safetensors") {
      throw_format(kCheckpointWhere, quote_text(path.string()) +
                                         " is neither a checkpoint folder nor a .safetensors file");
    }
    shard_names_ = {path.filename().string()};
    folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  } else if (has_entry(path / kSingleName)) {
    shard_names_ = {kSingleName};
  } else if (has_entry(path / kIndexName)) {
    sharded_ = true;
    weight_map = read_index(path / kIndexName);
    std::set<std::string> names;
    for (const auto& [tensor, shard] : weight_map) names.insert(shard);
    shard_names_.assign(names.begin(), names.end());
    for (const std::string& name : shard_names_) check_shard(path, name, follow_links);
  } else {
    throw_no_model(path);
  }
  config_json_ = read_config(folder / "config.json");

  for (std::size_t s = 0; s < shard_names_.size(); ++s) {
    shards_.push_back(std::make_shared<SafetensorsFile>(folder / shard_names_[s]));
    const std::vector<TensorInfo>& tensors = shards_.back()->tensors();
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      const auto [place, inserted] = where_.emplace(tensors[t].name, std::pair(s, t));
      if (!inserted) {
        throw_format(kCheckpointWhere, quote_text(path.string()) + ": tensor " +
                                           quote_text(tensors[t].name) + " is in two shards, " +
                                           quote_text(shard_names_[place->second.first]) + " and " +
                                           quote_text(shard_names_[s]));
      }
    }
  }
  if (sharded_) check_index(path, weight_map, shard_names_, where_);
}

std::pair<const TensorInfo*, std::size_t> Checkpoint::find(const std::string& name) const {
  const auto place = where_.find(name);
  if (place == where_.end()) return {nullptr, 0};
  const auto [shard, tensor] = place->second;
  return {&shards_[shard]->tensors()[tensor], shard};
}

std::uint64_t Checkpoint::total_bytes() const {
  std::uint64_t total = 0;
  for (const auto& shard : shards_) {
    for (const TensorInfo& info : shard->tensors()) total += info.nbytes();
  }
  return total;
}

}  // namespace hqq
