// hqq_cpp.manifest.json: what a quantized folder holds, so that any later change to it can be
// found.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

namespace hqq {

inline constexpr const char* kManifestName = "hqq_cpp.manifest.json";

struct FileRecord {
  std::uint64_t size = 0;
  std::string xxh3_128;
  friend bool operator==(const FileRecord&, const FileRecord&) = default;
};

struct Manifest {
  std::string version;                      // of the library that wrote the folder
  nlohmann::ordered_json config;            // config_to_json()
  nlohmann::ordered_json source;            // fingerprint_source(), without times
  nlohmann::ordered_json importance;        // fingerprint_file(), or null
  std::map<std::string, FileRecord> files;  // relative names with '/', all but the manifest itself
};

// The text of the file. Its last field is the hash of all the others.
std::string manifest_text(const Manifest& manifest);
// Throws FormatError for anything manifest_text() does not write, down to a changed space, and
// std::system_error when the file cannot be read.
Manifest read_manifest(const std::filesystem::path& folder);

}  // namespace hqq
