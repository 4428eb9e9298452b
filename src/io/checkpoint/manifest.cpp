#include "src/io/checkpoint/manifest.hpp"

#include <span>

#include "hqq/error.hpp"
#include "hqq/version.hpp"
#include "src/base/json.hpp"
#include "src/io/atomic_file.hpp"

namespace hqq {
namespace {

using Json = nlohmann::ordered_json;

std::string text_of(const Json& json) { return json.dump(2) + "\n"; }

// Without the field itself.
std::string self_hash(Json json) {
  json.erase("self");
  const std::string text = json.dump();
  return xxh3_hex(std::as_bytes(std::span(text)));
}

const Json& field(const Json& json, const char* key, const std::string& where) {
  const auto found = json.find(key);
  if (found == json.end()) throw_format(where, std::string("the field ") + key + " is missing");
  return *found;
}

FileRecord read_record(const std::string& name, const Json& json, const std::string& where) {
  const bool valid = json.is_object() && json.size() == 2 && json.contains("size") &&
                     json["size"].is_number_unsigned() && json.contains("xxh3_128") &&
                     json["xxh3_128"].is_string();
  if (!valid) {
    throw_format(where, "the entry of file " + quote_text(name) + " must hold size and xxh3_128");
  }
  return {json["size"].get<std::uint64_t>(), json["xxh3_128"].get<std::string>()};
}

}  // namespace

std::string manifest_text(const Manifest& manifest) {
  Json json;
  json["format_version"] = kFormatVersion;
  json["version"] = manifest.version;
  json["config"] = manifest.config;
  json["source"] = manifest.source;
  json["importance"] = manifest.importance;
  Json files = Json::object();
  for (const auto& [name, record] : manifest.files) {
    files[name] = {{"size", record.size}, {"xxh3_128", record.xxh3_128}};
  }
  json["files"] = files;
  json["self"] = self_hash(json);
  return text_of(json);
}

Manifest read_manifest(const std::filesystem::path& folder) {
  const std::string where = kManifestName;
  const std::string text = read_text_file(folder / kManifestName);
  const Json json = parse_json(text, where);
  if (!json.is_object()) throw_format(where, "it must hold a JSON object");
  const Json& self = field(json, "self", where);
  if (!self.is_string() || self != self_hash(json)) {
    throw_format(where, "its own hash does not match: the manifest was changed or damaged");
  }
  const Json& format = field(json, "format_version", where);
  if (format != kFormatVersion) {
    throw_format(where, "format_version is " + format.dump() + "; this library reads version " +
                            std::to_string(kFormatVersion));
  }
  // A flipped bit in white space leaves the values as they were.
  if (text != text_of(json)) {
    throw_format(where, "its white space or order was changed; every byte counts");
  }
  Manifest manifest;
  const Json& version = field(json, "version", where);
  if (!version.is_string()) throw_format(where, "version must be a string");
  manifest.version = version.get<std::string>();
  manifest.config = field(json, "config", where);
  manifest.source = field(json, "source", where);
  manifest.importance = field(json, "importance", where);
  const Json& files = field(json, "files", where);
  if (!files.is_object()) throw_format(where, "files must be an object");
  for (const auto& [name, record] : files.items()) {
    manifest.files.emplace(name, read_record(name, record, where));
  }
  return manifest;
}

}  // namespace hqq
