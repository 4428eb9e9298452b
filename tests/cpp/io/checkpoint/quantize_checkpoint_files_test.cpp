// quantize_checkpoint and the files of a folder: those beside the weights, links, and files that
// change.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "src/io/formats/layer_store.hpp"
#include "tests/cpp/support/message_of.hpp"
#include "tests/cpp/support/model_test_util.hpp"

namespace hqq {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using testing::contents_of;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::message_of;
using testing::read_bytes;
using testing::same_contents;
using testing::save_model;
using testing::save_model_file;
using testing::TempFolder;
using testing::write_bytes;

TEST(QuantizeCheckpointFiles, OtherFiles) {
  const TempFolder folder;
  save_model(folder / "m", {testing::layer_tensors(0)});
  fs::create_directories(folder / "m/1_Pooling");
  fs::create_directories(folder / "m/.cache");
  fs::create_directories(folder / "m/onnx");
  fs::create_directories(folder / "m/empty");
  for (const char* name :
       {"README.md", "1_Pooling/config.json", "1_Pooling/model.safetensors", "merges.txt",
        "pytorch_model.bin", "model.pt", "consolidated.safetensors", "model.gguf", ".gitattributes",
        ".cache/x", "pytorch_model.bin.index.json", "onnx/model.onnx", "hqq_cpp.manifest.json"}) {
    write_bytes(folder / "m" / name, name);
  }
  quantize_checkpoint(folder / "m", folder / "q", {});
  std::vector<std::string> names;
  for (const auto& [name, content] : contents_of(folder / "q")) names.push_back(name);
  EXPECT_THAT(names, ElementsAre("1_Pooling/config.json", "1_Pooling/model.safetensors",
                                 "README.md", "config.json", "hqq_cpp.manifest.json", "merges.txt",
                                 "model.safetensors", "tokenizer.json"));
  EXPECT_EQ(read_bytes(folder / "q/1_Pooling/config.json"), "1_Pooling/config.json");
  EXPECT_TRUE(verify_checkpoint(folder / "q").problems.empty());
}

TEST(QuantizeCheckpointFiles, LinkedFilesAsInACache) {
  const TempFolder folder;
  save_model(folder / "real", {testing::layer_tensors(0)});
  fs::create_directories(folder / "snapshot");
  for (const char* name : {"model.safetensors", "config.json", "tokenizer.json"}) {
    fs::create_symlink(folder / "real" / name, folder / "snapshot" / name);
  }
  quantize_checkpoint(folder / "real", folder / "a", {});
  for (const char* name : {"tokenizer.json", "config.json"}) {
    EXPECT_THAT(message_of<FormatError>(
                    [&] { quantize_checkpoint(folder / "snapshot", folder / "b", {}); }),
                AllOf(HasSubstr("is a link that leaves the folder"), HasSubstr("follow_links")))
        << name;
    fs::remove(folder / "snapshot" / name);
    fs::copy_file(folder / "real" / name, folder / "snapshot" / name);
  }
  fs::remove(folder / "snapshot/tokenizer.json");
  fs::create_symlink(folder / "real/tokenizer.json", folder / "snapshot/tokenizer.json");
  QuantizeCheckpointOptions options;
  options.follow_links = true;
  quantize_checkpoint(folder / "snapshot", folder / "c", {}, options);
  EXPECT_TRUE(same_contents(contents_of(folder / "a"), contents_of(folder / "c")));
  fs::remove(folder / "snapshot/tokenizer.json");
  fs::copy_file(folder / "real/tokenizer.json", folder / "snapshot/tokenizer.json");
  quantize_checkpoint(folder / "snapshot", folder / "b", {});
  EXPECT_TRUE(same_contents(contents_of(folder / "a"), contents_of(folder / "b")));
}

// The result would lack them without a word.
TEST(QuantizeCheckpointFiles, FilesThatCannotBeCopied) {
  const TempFolder folder;
  save_model(folder / "m", {testing::layer_tensors(0)});
  const auto refusal = [&] {
    return message_of<FormatError>([&] { quantize_checkpoint(folder / "m", folder / "q", {}); });
  };
  const fs::path file = folder / "m/vocab.json";
  fs::create_symlink("gone.json", file);
  EXPECT_THAT(refusal(), AllOf(HasSubstr("vocab.json"), HasSubstr("a file that is not there")));
  fs::remove(file);
  ASSERT_EQ(::mkfifo(file.c_str(), 0600), 0);
  EXPECT_THAT(refusal(), AllOf(HasSubstr("vocab.json"), HasSubstr("neither a file nor a folder")));
  EXPECT_THAT(folder.names(), ElementsAre("m"));
  fs::remove(file);
  // Hidden files and other formats are not copied, whatever they are.
  fs::create_symlink("gone", folder / "m/.gone");
  fs::create_symlink("gone", folder / "m/pytorch_model.bin");
  quantize_checkpoint(folder / "m", folder / "q", {});
}

// Such a folder would stand where the result has a file, after all the work.
TEST(QuantizeCheckpointFiles, AFolderNamedLikeAFileOfOurs) {
  for (const char* name : {"hqq_cpp.manifest.json", "other.safetensors", "config.json"}) {
    const TempFolder folder;
    save_model(folder / "m", {testing::layer_tensors(0)});
    fs::remove(folder / "m" / name);
    fs::create_directories(folder / "m" / name);
    EXPECT_ANY_THROW(quantize_checkpoint(folder / "m", folder / "q", {})) << name;
    EXPECT_THAT(folder.names(), ElementsAre("m")) << name;
  }
}

TEST(QuantizeCheckpointFiles, ABareFile) {
  const TempFolder folder;
  save_model_file(folder / "weights.safetensors", testing::layer_tensors(0));
  write_bytes(folder / "unrelated.txt", "not part of the model");
  quantize_checkpoint(folder / "weights.safetensors", folder / "q", {});
  std::vector<std::string> names;
  for (const auto& [name, content] : contents_of(folder / "q")) names.push_back(name);
  EXPECT_THAT(names, ElementsAre("config.json", "hqq_cpp.manifest.json", "model.safetensors"));
  EXPECT_EQ(quantized_layers(Checkpoint(folder / "q")).size(), 2u);
  EXPECT_TRUE(verify_checkpoint(folder / "q").problems.empty());
}

// The result would hold old and new weights.
TEST(QuantizeCheckpointFiles, ASourceThatChangesWhileItIsRead) {
  for (const bool replaced : {false, true}) {
    const TempFolder folder;
    save_model(folder / "m", {testing::layer_tensors(0)});
    const fs::path shard = folder / "m/model.safetensors";
    bool done = false;
    QuantizeCheckpointOptions options;
    options.progress = [&](const Progress&) {
      if (std::exchange(done, true)) return true;
      const fs::path written = replaced ? folder / "m/new" : shard;
      if (replaced) fs::copy_file(shard, written);
      std::fstream file(written, std::ios::in | std::ios::out | std::ios::binary);
      file.seekp(-1, std::ios::end).put('x');
      file.close();
      if (replaced) fs::rename(written, shard);
      return true;
    };
    EXPECT_THAT(message_of<std::invalid_argument>(
                    [&] { quantize_checkpoint(folder / "m", folder / "q", {}, options); }),
                AllOf(HasSubstr("model.safetensors"), HasSubstr("was changed while it was read")));
    EXPECT_TRUE(done);
    EXPECT_FALSE(fs::exists(folder / "q"));
  }
}

}  // namespace
}  // namespace hqq
