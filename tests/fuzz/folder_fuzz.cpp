// A whole folder, and what the commands do with it. After two bytes (the command, and what is put
// right before) the input has parts: config.json, the index, two shards, the manifest, the journal
// of an interrupted run, settings.
#include <algorithm>
#include <span>
#include <vector>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "src/io/atomic_file.hpp"
#include "src/io/checkpoint/manifest.hpp"
#include "src/io/checkpoint/output_folder.hpp"
#include "src/io/formats/layer_store.hpp"
#include "tests/fuzz/fuzz_util.hpp"

namespace {

using namespace hqq;
using fuzzing::accepted;
using fuzzing::require;
using fuzzing::scratch;
using Json = nlohmann::ordered_json;
namespace fs = std::filesystem;

enum Command { kRead, kVerify, kToOurs, kToUpstream, kDequantize, kQuantize, kDiff, kCommands };
enum Repair { kOffsets = 1, kManifestHash = 2, kResume = 4 };
enum Part { kConfig, kIndex, kShardA, kShardB, kManifest, kJournal, kSettings, kParts };

std::vector<std::string> parts_of(std::string_view input) {
  constexpr std::string_view kBetween = "\n====\n";
  std::vector<std::string> parts;
  for (std::size_t at; (at = input.find(kBetween)) != std::string_view::npos;) {
    parts.emplace_back(input.substr(0, at));
    input.remove_prefix(at + kBetween.size());
  }
  parts.emplace_back(input);
  parts.resize(kParts);
  return parts;
}

// The bytes of a tensor that a header describes; none where it says nothing that can be counted.
std::uint64_t described_bytes(const Json& tensor) {
  if (!tensor.is_object() || !tensor.contains("shape") || !tensor.contains("dtype")) return 0;
  if (!tensor["dtype"].is_string()) return 0;
  const auto dtype = dtype_from_safetensors_name(tensor["dtype"].get<std::string>());
  std::uint64_t bytes = dtype ? dtype_size(*dtype) : 0;
  for (const Json& size : tensor["shape"]) {
    bytes *= std::min<std::uint64_t>(size.is_number_unsigned() ? size.get<std::uint64_t>() : 0,
                                     std::uint64_t{1} << 16);
    if (bytes > std::uint64_t{1} << 16) return 0;
  }
  return bytes;
}

// Tensors one after the other with as much data as they need, so that mutations get past the
// header.
void put_offsets_right(std::string& header, std::string& data) {
  Json json = Json::parse(header, nullptr, false);
  if (!json.is_object()) return;
  std::uint64_t end = 0;
  for (auto& [name, tensor] : json.items()) {
    const std::uint64_t bytes = name == "__metadata__" ? 0 : described_bytes(tensor);
    if (bytes == 0) continue;
    tensor["data_offsets"] = {end, end + bytes};
    end += bytes;
  }
  header = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  const std::string given = data.empty() ? std::string(1, '\0') : data;
  data.resize(end);
  for (std::size_t i = 0; i < end; ++i) data[i] = given[i % given.size()];
}

// The file of a part: header, a line "--", data.
std::string shard_file(const std::string& part, bool repair) {
  constexpr std::string_view kBetween = "\n--\n";
  const std::size_t at = std::min(part.find(kBetween), part.size());
  std::string header = part.substr(0, at);
  std::string data = at == part.size() ? "" : part.substr(at + kBetween.size());
  if (repair) put_offsets_right(header, data);
  std::string length(8, '\0');
  for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i));
  return length + header + data;
}

// A changed manifest with the hash of what it says now.
std::string hashed_manifest(const std::string& text) {
  Json json = Json::parse(text, nullptr, false);
  if (!json.is_object()) return text;
  json.erase("self");
  const std::string body = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  json["self"] = xxh3_hex(std::as_bytes(std::span(body)));
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

void write_model(const std::vector<std::string>& parts, int repairs) {
  const auto shard = [&](Part part) { return shard_file(parts[part], repairs & kOffsets); };
  const auto write_text = [&](Part part, const std::string& name) {
    if (!parts[part].empty()) scratch().write(name, parts[part]);
  };
  write_text(kConfig, "m/config.json");
  if (parts[kIndex].empty()) {
    scratch().write("m/model.safetensors", shard(kShardA));
  } else {
    write_text(kIndex, "m/model.safetensors.index.json");
    scratch().write("m/a.safetensors", shard(kShardA));
    if (!parts[kShardB].empty()) scratch().write("m/b.safetensors", shard(kShardB));
  }
  if (!parts[kManifest].empty()) {
    scratch().write(std::string("m/") + kManifestName,
                    repairs & kManifestHash ? hashed_manifest(parts[kManifest]) : parts[kManifest]);
  }
  write_text(kJournal, std::string("q.partial/") + kJournalName);
}

void read_layers(const fs::path& folder) {
  const Checkpoint checkpoint(folder);
  for (const StoredLayer& layer : read_stored_layers(checkpoint)) {
    const std::int64_t matrices = std::min<std::int64_t>(layer.description.matrices(), 3);
    for (std::int64_t expert = 0; expert < matrices; ++expert) {
      const QuantizedTensor q = read_matrix(layer, expert);
      q.validate("fuzz");
      std::vector<float> values(static_cast<std::size_t>(q.out_features * q.in_features));
      dequantize(q, values.data(), {DType::kF32, 1});
    }
  }
}

void quantize(const std::string& settings, bool resume) {
  QuantizeCheckpointOptions options;
  options.threads = 1;
  options.resume = resume;
  const HqqConfig config = settings.empty() ? HqqConfig{} : HqqConfig::from_json_text(settings);
  quantize_checkpoint(scratch() / "m", scratch() / "q", config, options);
  const VerifyReport report = verify_checkpoint(scratch() / "q");
  require(report.problems.empty(), report.problems.empty() ? "" : report.problems.front());
}

void run(Command command, const std::vector<std::string>& parts, int repairs) {
  const fs::path model = scratch() / "m", out = scratch() / "q";
  CheckpointOptions options;
  options.threads = 1;
  switch (command) {
    case kRead:
      return read_layers(model);
    case kVerify:
      return void(verify_checkpoint(model, options));
    case kToOurs:
      return convert_checkpoint(model, out, CheckpointFormat::kHqqCpp, options);
    case kToUpstream:
      return convert_checkpoint(model, out, CheckpointFormat::kUpstream, options);
    case kDequantize:
      return dequantize_checkpoint(model, out, DType::kF32, options);
    case kQuantize:
      return quantize(parts[kSettings], repairs & kResume);
    default:
      return void(diff_checkpoints(model, model, options));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  const auto command = static_cast<Command>(data[0] % kCommands);
  const std::vector<std::string> parts = parts_of(fuzzing::text_of(data + 2, size - 2));
  scratch().clear();
  write_model(parts, data[1]);
  const bool done = accepted([&] { run(command, parts, data[1]); });
  const bool writes = command >= kToOurs && command <= kQuantize;
  require(fs::exists(scratch() / "q") == (done && writes), "a destination is there if it is whole");
  if (done && writes) Checkpoint(scratch() / "q");
  return 0;
}
