// The manifest, and verify_checkpoint: whatever changes in a folder is found.
#include "src/io/checkpoint/manifest.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "src/io/atomic_file.hpp"
#include "src/io/formats/layer_store.hpp"
#include "tests/cpp/support/message_of.hpp"
#include "tests/cpp/support/model_test_util.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::message_of;
using ::testing::Not;
using testing::read_bytes;
using testing::save_model;
using testing::sharded_model;
using testing::TempFolder;
using testing::write_bytes;

const std::string kShard1 = "model-00001-of-00003.safetensors";
const std::string kShard2 = "model-00002-of-00003.safetensors";

Manifest sample() {
  Manifest manifest;
  manifest.version = "1.2.3";
  manifest.config = {{"z", 1}, {"a", {{"k", 2.5}}}};
  manifest.source = {{"x", {{"size", 1}}}};
  manifest.importance = nullptr;
  manifest.files = {{"b", {2, "bb"}}, {"a/c", {std::uint64_t{1} << 60, "cc"}}};
  return manifest;
}

TEST(Manifest, RoundTrip) {
  const TempFolder folder;
  write_bytes(folder / kManifestName, manifest_text(sample()));
  const Manifest read = read_manifest(folder.path());
  EXPECT_EQ(read.version, "1.2.3");
  EXPECT_EQ(read.config.dump(), sample().config.dump());
  EXPECT_EQ(read.source, sample().source);
  EXPECT_TRUE(read.importance.is_null());
  EXPECT_EQ(read.files, sample().files);
}

TEST(Manifest, AFlippedBitIsFound) {
  const TempFolder folder;
  const std::string text = manifest_text(sample());
  // A third of them, each position in a byte alike.
  for (std::size_t bit = 0; bit < 8 * text.size(); bit += 3) {
    std::string changed = text;
    changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ (1 << (bit % 8)));
    write_bytes(folder / kManifestName, changed);
    EXPECT_THROW(read_manifest(folder.path()), FormatError) << "bit " << bit;
  }
}

TEST(Manifest, Refusals) {
  const TempFolder folder;
  EXPECT_THROW(read_manifest(folder.path()), std::system_error);
  const auto refusal = [&](const std::string& text) {
    write_bytes(folder / kManifestName, text);
    return message_of<FormatError>([&] { read_manifest(folder.path()); });
  };
  // Text with a valid hash, whatever else it says.
  const auto with_hash = [](nlohmann::ordered_json json) {
    const std::string text = json.dump();
    json["self"] = xxh3_hex(std::as_bytes(std::span(text)));
    return json.dump(2) + "\n";
  };
  auto good = nlohmann::ordered_json::parse(manifest_text(sample()));
  good.erase("self");
  EXPECT_EQ(with_hash(good), manifest_text(sample()));

  EXPECT_THAT(refusal(""), HasSubstr(kManifestName));
  EXPECT_THAT(refusal("[]"), HasSubstr("must hold a JSON object"));
  EXPECT_THAT(refusal("{}"), HasSubstr("self is missing"));
  EXPECT_THAT(refusal(good.dump(2)), HasSubstr("self is missing"));
  EXPECT_THAT(refusal(manifest_text(sample()) + "\n"), HasSubstr("white space"));
  auto json = good;
  json["format_version"] = 2;
  EXPECT_THAT(refusal(with_hash(json)), HasSubstr("format_version is 2; this library reads"));
  for (const char* key : {"version", "config", "source", "importance", "files"}) {
    json = good;
    json.erase(key);
    EXPECT_THAT(refusal(with_hash(json)), HasSubstr(std::string(key) + " is missing"));
  }
  json = good;
  json["files"] = nlohmann::json::array();
  EXPECT_THAT(refusal(with_hash(json)), HasSubstr("files must be an object"));
  for (const char* record :
       {"1", "{}", R"({"size": 1, "xxh3_128": 2})", R"({"size": -1, "xxh3_128": "x"})",
        R"({"size": 1, "xxh3_128": "x", "more": 1})"}) {
    json = good;
    json["files"]["b"] = nlohmann::json::parse(record);
    EXPECT_THAT(refusal(with_hash(json)), HasSubstr("entry of file \"b\"")) << record;
  }
  json = good;
  json["version"] = 1;
  EXPECT_THAT(refusal(with_hash(json)), HasSubstr("version must be a string"));
}

class Verify : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    shared_ = new TempFolder;
    save_model(*shared_ / "m", sharded_model());
    HqqConfig config;
    config.defaults.nbits = BitWidth::kTernary;
    quantize_checkpoint(*shared_ / "m", *shared_ / "q", config);
  }
  static void TearDownTestSuite() { delete shared_; }
  void SetUp() override { fs::copy(*shared_ / "q", q(), fs::copy_options::recursive); }

  fs::path q() const { return folder_ / "q"; }
  std::vector<std::string> problems() const { return verify_checkpoint(q()).problems; }
  // Makes the manifest agree with what the folder holds now.
  void rewrite_manifest() const {
    Manifest manifest = read_manifest(q());
    for (auto& [name, record] : manifest.files) {
      record = {fs::file_size(q() / name), hash_file(q() / name)};
    }
    write_bytes(q() / kManifestName, manifest_text(manifest));
  }
  // Overwrites bytes of a tensor.
  void poke(const std::string& shard, const std::string& tensor, std::uint64_t offset,
            const std::string& bytes) const {
    const SafetensorsFile file(q() / shard);
    std::uint64_t data = 0;
    for (const TensorInfo& info : file.tensors()) data = std::max(data, info.end);
    std::string content = read_bytes(q() / shard);
    content.replace(content.size() - data + file.find(tensor)->begin + offset, bytes.size(), bytes);
    write_bytes(q() / shard, content);
  }

  static TempFolder* shared_;
  TempFolder folder_;
};
TempFolder* Verify::shared_ = nullptr;

TEST_F(Verify, AWholeFolder) {
  std::uint64_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(q())) bytes += entry.file_size();
  std::vector<Progress> calls;
  CheckpointOptions options;
  options.progress = [&](const Progress& progress) {
    calls.push_back(progress);
    return true;
  };
  const VerifyReport report = verify_checkpoint(q(), options);
  EXPECT_THAT(report.problems, IsEmpty());
  EXPECT_EQ(report.files, 7u);
  EXPECT_EQ(report.layers, 12u);
  EXPECT_EQ(report.bytes, bytes);
  ASSERT_FALSE(calls.empty());
  EXPECT_EQ(calls.front().stage, "verify");
  EXPECT_EQ(calls.back().done, calls.back().total);
}

TEST_F(Verify, AFlippedBitInAnyFile) {
  std::mt19937 random(1);
  for (const auto& entry : fs::directory_iterator(shared_->path() / "q")) {
    const std::string name = entry.path().filename().string();
    const std::string good = read_bytes(q() / name);
    for (int trial = 0; trial < 8; ++trial) {
      const std::size_t bit = trial == 0   ? 0
                              : trial == 1 ? 8 * good.size() - 1
                                           : random() % (8 * good.size());
      std::string changed = good;
      changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ (1 << (bit % 8)));
      write_bytes(q() / name, changed);
      EXPECT_THAT(problems(), Contains(HasSubstr(name))) << "bit " << bit;
    }
    write_bytes(q() / name, good);
  }
  EXPECT_THAT(problems(), IsEmpty());
}

TEST_F(Verify, SwappedShards) {
  fs::rename(q() / kShard1, q() / "x");
  fs::rename(q() / kShard2, q() / kShard1);
  fs::rename(q() / "x", q() / kShard2);
  const std::vector<std::string> found = problems();
  EXPECT_THAT(found, Contains("\"" + kShard1 + "\" holds what belongs into \"" + kShard2 + "\""));
  EXPECT_THAT(found, Contains("\"" + kShard2 + "\" holds what belongs into \"" + kShard1 + "\""));
}

TEST_F(Verify, MissingAndExtraFiles) {
  fs::remove(q() / kShard1);
  fs::remove(q() / "tokenizer.json");
  write_bytes(q() / "extra.txt", "");
  fs::create_directories(q() / "sub");
  write_bytes(q() / "sub/more", "");
  fs::create_symlink("config.json", q() / "link");
  EXPECT_THAT(problems(),
              AllOf(Contains(AllOf(HasSubstr(kShard1), HasSubstr("is missing"))),
                    Contains(AllOf(HasSubstr("tokenizer.json"), HasSubstr("is missing"))),
                    Contains(AllOf(HasSubstr("extra.txt"), HasSubstr("does not belong"))),
                    Contains(AllOf(HasSubstr("sub/more"), HasSubstr("does not belong"))),
                    Contains(AllOf(HasSubstr("link"), HasSubstr("does not belong")))));
}

TEST_F(Verify, TruncatedAndReplacedFiles) {
  fs::resize_file(q() / kShard1, fs::file_size(q() / kShard1) - 1);
  fs::remove(q() / "tokenizer.json");
  fs::create_directories(q() / "tokenizer.json");
  EXPECT_THAT(problems(), AllOf(Contains(AllOf(HasSubstr(kShard1), HasSubstr("the manifest says"))),
                                Contains(HasSubstr("\"tokenizer.json\" is missing"))));
}

TEST_F(Verify, ALinkIsNotTheFile) {
  fs::rename(q() / "tokenizer.json", folder_ / "elsewhere");
  fs::create_symlink(folder_ / "elsewhere", q() / "tokenizer.json");
  EXPECT_THAT(problems(), ElementsAre("\"tokenizer.json\" is not a regular file"));
}

TEST_F(Verify, WithoutAManifest) {
  fs::remove(q() / kManifestName);
  EXPECT_THAT(problems(), ElementsAre(AllOf(HasSubstr(kManifestName), HasSubstr("is missing"))));
  EXPECT_EQ(verify_checkpoint(q()).layers, 12u);
}

TEST_F(Verify, InvariantsOfLayers) {
  const std::string layer = "model.layers.1.self_attn.q_proj";
  poke(kShard1, layer + ".scale", 6, std::string("\0\x7C", 2));        // infinity in float16
  poke(kShard1, layer + ".zero", 0, std::string("\1\xFC", 2));         // NaN
  poke(kShard1, layer + ".col_scale", 254, std::string("\0\xFC", 2));  // -infinity
  poke(kShard1, layer + ".W_q", 100, "\xF3");                          // 243
  rewrite_manifest();
  const std::string start = "layer \"" + layer + "\": ";
  EXPECT_THAT(problems(),
              ElementsAre(start + "scale is not finite at position 3",
                          start + "zero is not finite at position 0",
                          start + "col_scale is not finite at position 127",
                          start + "W_q holds 243 at byte 100; ternary bytes are at most 242"));
}

TEST_F(Verify, ABrokenDescription) {
  std::string content = read_bytes(q() / kShard1);
  // Same length, another meaning.
  const std::string from = R"(\"axis\":1)", to = R"(\"axis\":7)";
  content.replace(content.find(from), from.size(), to);
  write_bytes(q() / kShard1, content);
  rewrite_manifest();
  EXPECT_THAT(problems(), ElementsAre(AllOf(HasSubstr(kShard1), HasSubstr("axis is 7"))));
}

TEST_F(Verify, PlainFoldersAndFiles) {
  const std::vector<std::string> found = verify_checkpoint(shared_->path() / "m").problems;
  EXPECT_THAT(found, ElementsAre(HasSubstr(kManifestName), "no shard describes a quantized layer"));
  EXPECT_THAT(message_of<std::invalid_argument>([&] { verify_checkpoint(q() / kShard1); }),
              HasSubstr("is not a folder"));
  EXPECT_THROW(verify_checkpoint(q() / "absent"), std::invalid_argument);
}

TEST_F(Verify, CanBeStopped) {
  CheckpointOptions options;
  options.progress = [](const Progress&) { return false; };
  EXPECT_THROW(verify_checkpoint(q(), options), Interrupted);
}

}  // namespace
}  // namespace hqq
