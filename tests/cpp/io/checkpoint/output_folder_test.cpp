// The destination: what it replaces and what it never replaces. How an interrupted run goes on:
// resume_test.cpp.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <system_error>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
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
using testing::sharded_model;
using testing::TempFolder;
using testing::write_bytes;

QuantizeCheckpointOptions with(bool force, bool resume) {
  QuantizeCheckpointOptions options;
  options.force = force;
  options.resume = resume;
  return options;
}

// A model "m", and what quantizing it gives.
class OutputFolderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    save_model(folder_ / "m", sharded_model());
    quantize_checkpoint(folder_ / "m", folder_ / "whole", {});
    expected_ = contents_of(folder_ / "whole");
  }

  TempFolder folder_;
  std::map<std::string, std::string> expected_;
};

TEST_F(OutputFolderTest, ForceReplacesACheckpoint) {
  fs::create_directories(folder_ / "q/sub");
  write_bytes(folder_ / "q/config.json", "{}");
  write_bytes(folder_ / "q/sub/old.txt", "old");
  EXPECT_THAT(message_of<std::invalid_argument>(
                  [&] { quantize_checkpoint(folder_ / "m", folder_ / "q", {}); }),
              HasSubstr("exists; use force to replace it"));
  EXPECT_TRUE(fs::exists(folder_ / "q/sub/old.txt"));
  quantize_checkpoint(folder_ / "m", folder_ / "q", {}, with(true, false));
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
  EXPECT_THAT(folder_.names(), ElementsAre("m", "q", "whole"));
}

TEST_F(OutputFolderTest, AFailedReplacementKeepsTheOldOne) {
  save_model(folder_ / "q", sharded_model());
  const auto old = contents_of(folder_ / "q");
  QuantizeCheckpointOptions options = with(true, false);
  options.progress = [](const Progress&) { return false; };
  EXPECT_THROW(quantize_checkpoint(folder_ / "m", folder_ / "q", {}, options), Interrupted);
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), old));
}

TEST_F(OutputFolderTest, WhatIsNoCheckpointIsNeverReplaced) {
  fs::create_directories(folder_ / "home");
  write_bytes(folder_ / "home/thesis.tex", "precious");
  write_bytes(folder_ / "file", "precious");
  fs::create_directories(folder_ / "new.partial");
  write_bytes(folder_ / "new.partial/thesis.tex", "precious");
  for (const char* name : {"home", "file", "new"}) {
    EXPECT_THAT(message_of<std::invalid_argument>([&] {
                  quantize_checkpoint(folder_ / "m", folder_ / name, {}, with(true, false));
                }),
                HasSubstr("is not a checkpoint folder"))
        << name;
  }
  EXPECT_EQ(read_bytes(folder_ / "home/thesis.tex"), "precious");
  EXPECT_EQ(read_bytes(folder_ / "file"), "precious");
  EXPECT_EQ(read_bytes(folder_ / "new.partial/thesis.tex"), "precious");
  // An empty folder may be taken.
  fs::create_directories(folder_ / "empty");
  quantize_checkpoint(folder_ / "m", folder_ / "empty/", {}, with(true, false));
  EXPECT_TRUE(same_contents(contents_of(folder_ / "empty"), expected_));
}

TEST_F(OutputFolderTest, SourceAndDestinationMustNotOverlap) {
  fs::create_directory_symlink(folder_ / "m", folder_ / "link");
  for (const fs::path& destination :
       {folder_ / "m", folder_ / "m/", folder_ / "m/sub", folder_ / ".", folder_ / "link",
        folder_ / "link/sub", folder_ / "x/../m"}) {
    EXPECT_THAT(message_of<std::invalid_argument>(
                    [&] { quantize_checkpoint(folder_ / "m", destination, {}, with(true, true)); }),
                HasSubstr("overlap"))
        << destination;
  }
  fs::rename(folder_ / "m", folder_ / "q.partial");
  EXPECT_THAT(message_of<std::invalid_argument>([&] {
                quantize_checkpoint(folder_ / "q.partial", folder_ / "q", {}, with(true, false));
              }),
              HasSubstr("overlap"));
  EXPECT_TRUE(fs::exists(folder_ / "q.partial/config.json"));
}

TEST_F(OutputFolderTest, ParentFoldersAreMade) {
  quantize_checkpoint(folder_ / "m", folder_ / "a/b/q", {});
  EXPECT_TRUE(same_contents(contents_of(folder_ / "a/b/q"), expected_));
}

TEST(FreeSpace, IsCheckedBeforeAnythingIsWritten) {
  const TempFolder folder;
  // A file of zeros that takes no space, ten times as large as the disk: one seventh of it is
  // needed.
  const std::uint64_t available = fs::space(folder.path()).available;
  const std::uint64_t rows = available * 10 / (4 * 4096);
  const std::string header = R"({"a.weight":{"dtype":"F32","shape":[)" + std::to_string(rows) +
                             R"(,4096],"data_offsets":[0,)" + std::to_string(rows * 4 * 4096) +
                             "]}}";
  std::string start(8, '\0');
  for (int i = 0; i < 8; ++i) start[i] = static_cast<char>(header.size() >> (8 * i));
  write_bytes(folder / "x.safetensors", start + header);
  std::error_code error;
  fs::resize_file(folder / "x.safetensors", 8 + header.size() + rows * 4 * 4096, error);
  if (error) GTEST_SKIP() << "this file system has no files of " << rows * 4 * 4096 << " bytes";
  const std::string message = message_of<std::system_error>(
      [&] { quantize_checkpoint(folder / "x.safetensors", folder / "q", {}); });
  EXPECT_THAT(message, AllOf(HasSubstr("[quantize] the result needs"), HasSubstr("are free in")));
  EXPECT_THAT(folder.names(), ElementsAre("x.safetensors"));
}

}  // namespace
}  // namespace hqq
