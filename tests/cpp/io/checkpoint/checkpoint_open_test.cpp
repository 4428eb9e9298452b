#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "tests/cpp/support/io_test_util.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::message_of;
using testing::read_bytes;
using testing::TempFolder;
using testing::write_bytes;

constexpr const char* kIndex = "model.safetensors.index.json";

// A file of uint8 tensors [bytes] with these names.
void save(const fs::path& path, const std::vector<std::string>& names, std::int64_t bytes = 4) {
  const Tensor tensor = Tensor::allocate(DType::kU8, {bytes});
  std::memset(tensor.buffer.data, 7, tensor.nbytes());
  std::vector<std::pair<std::string, const Tensor*>> tensors;
  for (const std::string& name : names) tensors.emplace_back(name, &tensor);
  save_safetensors(path, tensors);
}

void save_index(const fs::path& folder, const std::map<std::string, std::string>& weight_map) {
  write_bytes(folder / kIndex, nlohmann::json{{"weight_map", weight_map}}.dump());
}

std::string error_of(const fs::path& path) {
  return message_of<FormatError>([&] { Checkpoint checkpoint(path); });
}

TEST(Checkpoint, SingleFileFolder) {
  const TempFolder folder;
  save(folder / "model.safetensors", {"a", "b"});
  const Checkpoint plain(folder.path());
  EXPECT_FALSE(plain.is_sharded());
  EXPECT_EQ(plain.path(), folder.path());
  EXPECT_THAT(plain.shard_names(), ElementsAre("model.safetensors"));
  EXPECT_EQ(plain.config_json(), "");
  EXPECT_EQ(plain.total_bytes(), 8u);
  const auto [info, shard] = plain.find("b");
  ASSERT_NE(info, nullptr);
  EXPECT_EQ(shard, 0u);
  EXPECT_EQ(info, &plain.shard(0).tensors()[1]);
  EXPECT_EQ(plain.find("c").first, nullptr);

  const std::string config = "{\"model_type\": \"llama\",\n \"x\": {}}\n";
  write_bytes(folder / "config.json", config);
  EXPECT_EQ(Checkpoint(folder.path()).config_json(), config);
}

TEST(Checkpoint, FileAloneUsesTheConfigBesideIt) {
  const TempFolder folder;
  save(folder / "any name.safetensors", {"a"});
  const Checkpoint alone(folder / "any name.safetensors");
  EXPECT_THAT(alone.shard_names(), ElementsAre("any name.safetensors"));
  EXPECT_NE(alone.find("a").first, nullptr);
  EXPECT_EQ(alone.config_json(), "");
  write_bytes(folder / "config.json", "{}");
  EXPECT_EQ(Checkpoint(folder / "any name.safetensors").config_json(), "{}");
  write_bytes(folder / "config.json", "[]");
  EXPECT_THAT(error_of(folder / "any name.safetensors"), HasSubstr("must hold a JSON object"));
}

TEST(Checkpoint, ShardsComeSorted) {
  const TempFolder folder;
  save(folder / "s-2.safetensors", {"a", "d"});
  save(folder / "s-1.safetensors", {"c"});
  save(folder / "s-3.safetensors", {"b"}, 10);
  // A file that the index does not name is no part of the checkpoint.
  write_bytes(folder / "other.safetensors", "broken");
  save_index(folder.path(), {{"a", "s-2.safetensors"},
                             {"b", "s-3.safetensors"},
                             {"c", "s-1.safetensors"},
                             {"d", "s-2.safetensors"}});
  const Checkpoint checkpoint(folder.path());
  EXPECT_TRUE(checkpoint.is_sharded());
  EXPECT_EQ(checkpoint.shard_count(), 3u);
  EXPECT_THAT(checkpoint.shard_names(),
              ElementsAre("s-1.safetensors", "s-2.safetensors", "s-3.safetensors"));
  EXPECT_EQ(checkpoint.find("d").second, 1u);
  EXPECT_EQ(checkpoint.find("b").second, 2u);
  EXPECT_EQ(checkpoint.total_bytes(), 22u);
}

TEST(Checkpoint, WholeFileWinsOverAnIndex) {
  const TempFolder folder;
  save(folder / "model.safetensors", {"a"});
  write_bytes(folder / kIndex, "broken");
  EXPECT_FALSE(Checkpoint(folder.path()).is_sharded());
}

TEST(Checkpoint, PathThatIsNoCheckpoint) {
  const TempFolder folder;
  try {
    Checkpoint checkpoint(folder / "gone");
    FAIL() << "opened a folder that does not exist";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code().value(), ENOENT);
    EXPECT_THAT(error.what(),
                HasSubstr("[checkpoint] cannot open \"" + (folder / "gone").string()));
  }
  EXPECT_THAT(error_of(folder.path()),
              HasSubstr("has neither model.safetensors nor model.safetensors.index.json"));
  for (const char* name : {"a.bin", "b.safetensors", "c.pt", "d.gguf", "e.txt"}) {
    write_bytes(folder / name, "x");
  }
  EXPECT_THAT(error_of(folder.path()), HasSubstr("index.json; it has \""));
  EXPECT_THAT(error_of(folder / "a.bin"),
              HasSubstr("is neither a checkpoint folder nor a .safetensors file"));
  EXPECT_THAT(error_of("/dev/null"), HasSubstr("is neither a checkpoint folder"));
}

TEST(Checkpoint, DanglingLinksAreNamed) {
  const TempFolder folder;
  fs::create_symlink("gone", folder / "model.safetensors");
  EXPECT_THAT(message_of<std::system_error>([&] { Checkpoint checkpoint(folder.path()); }),
              HasSubstr("model.safetensors\""));
  fs::remove(folder / "model.safetensors");
  save(folder / "model.safetensors", {"a"});
  fs::create_symlink("gone", folder / "config.json");
  EXPECT_THAT(message_of<std::system_error>([&] { Checkpoint checkpoint(folder.path()); }),
              HasSubstr("config.json\""));
}

TEST(Checkpoint, LinksOfAnIndexStayInTheFolder) {
  const TempFolder outside;
  save(outside / "secret.safetensors", {"a"});
  const TempFolder folder;
  save_index(folder.path(), {{"a", "x.safetensors"}});
  fs::create_symlink(outside / "secret.safetensors", folder / "x.safetensors");
  EXPECT_THAT(error_of(folder.path()),
              AllOf(HasSubstr("shard \"x.safetensors\" is a link that leaves the folder"),
                    HasSubstr("secret.safetensors"), HasSubstr("--follow-links")));
  EXPECT_NO_THROW(Checkpoint(folder.path(), /*follow_links=*/true));
  fs::remove(folder / "x.safetensors");
  fs::create_symlink("gone.safetensors", folder / "x.safetensors");
  EXPECT_THAT(error_of(folder.path()), HasSubstr("is missing"));
  fs::remove(folder / "x.safetensors");
  // Not missing: the system cannot say where it leads.
  fs::create_symlink("x.safetensors", folder / "x.safetensors");
  EXPECT_THAT(message_of<std::system_error>([&] { Checkpoint checkpoint(folder.path()); }),
              HasSubstr("x.safetensors\""));
  fs::remove(folder / "x.safetensors");

  save(folder / "y.safetensors", {"a"});
  fs::create_symlink("y.safetensors", folder / "x.safetensors");
  EXPECT_NO_THROW(Checkpoint(folder.path()));
  // The folder itself may be reached through a link.
  fs::create_directory_symlink(folder.path(), outside / "link");
  EXPECT_NO_THROW(Checkpoint(outside / "link"));
}

// huggingface_hub keeps models/blobs/<hash> and models/snapshots/<revision>/<name> ->
// ../../blobs/<hash>.
TEST(Checkpoint, CacheOfTheHubIsAllowed) {
  const TempFolder cache;
  const fs::path snapshot = cache.path() / "snapshots" / "0123abcd";
  fs::create_directories(snapshot);
  fs::create_directories(cache / "blobs");
  save(cache / "blobs" / "cafe", {"a"});
  fs::create_symlink("../../blobs/cafe", snapshot / "x.safetensors");
  save_index(snapshot, {{"a", "x.safetensors"}});
  EXPECT_NO_THROW(Checkpoint checkpoint(snapshot));

  // Only blobs: a neighbouring folder is as foreign as any other.
  fs::create_directories(cache / "other");
  fs::rename(cache / "blobs" / "cafe", cache / "other" / "cafe");
  fs::remove(snapshot / "x.safetensors");
  fs::create_symlink("../../other/cafe", snapshot / "x.safetensors");
  EXPECT_THAT(error_of(snapshot), HasSubstr("is a link that leaves the folder"));
}

TEST(Checkpoint, BundledModel) {
  const Checkpoint checkpoint(fs::path(HQQ_SOURCE_DIR) / "examples/tiny-llama");
  EXPECT_EQ(checkpoint.find("model.embed_tokens.weight").first->shape.size(), 2u);
  EXPECT_THAT(checkpoint.config_json(), HasSubstr("llama"));
}

// Every folder of the corpus is refused, each with a message of its own.
TEST(CheckpointHostile, EveryFolderIsRefused) {
  const fs::path folder = fs::path(HQQ_SOURCE_DIR) / "tests/golden/hostile";
  const auto cases = nlohmann::json::parse(read_bytes(folder / "expected.json"));
  int count = 0;
  for (const auto& [name, expected] : cases.items()) {
    if (name.ends_with(".safetensors")) continue;
    SCOPED_TRACE(name);
    const std::string message = error_of(folder / name);
    EXPECT_THAT(message, HasSubstr(expected["message"].get<std::string>()));
    EXPECT_THAT(message, HasSubstr((folder / name).string()));
    ++count;
  }
  EXPECT_GE(count, 40) << "the corpus lost folders";
}

// A broken file is refused through a checkpoint just the same.
TEST(CheckpointHostile, EveryFileIsRefusedAsAModel) {
  const fs::path folder = fs::path(HQQ_SOURCE_DIR) / "tests/golden/hostile";
  const auto cases = nlohmann::json::parse(read_bytes(folder / "expected.json"));
  const TempFolder copy;
  for (const auto& [name, expected] : cases.items()) {
    if (!name.ends_with(".safetensors")) continue;
    SCOPED_TRACE(name);
    fs::copy_file(folder / name, copy / "model.safetensors", fs::copy_options::overwrite_existing);
    EXPECT_THAT(error_of(copy.path()), HasSubstr(expected["message"].get<std::string>()));
  }
}

}  // namespace
}  // namespace hqq
