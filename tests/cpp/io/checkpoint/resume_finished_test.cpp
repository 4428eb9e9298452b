// `resume` where the destination is there already, and several processes at one destination.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <thread>

#include "hqq/checkpoint.hpp"
#include "hqq/error.hpp"
#include "src/io/checkpoint/folder_lock.hpp"
#include "src/io/checkpoint/output_folder.hpp"
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

constexpr const char* kShard = "model-00002-of-00003.safetensors";

class Finished : public ::testing::Test {
 protected:
  void SetUp() override {
    save_model(folder_ / "m", sharded_model());
    quantize_checkpoint(folder_ / "m", folder_ / "q", {});
    expected_ = contents_of(folder_ / "q");
  }

  void resume() {
    QuantizeCheckpointOptions options;
    options.resume = true;
    quantize_checkpoint(folder_ / "m", folder_ / "q", {}, options);
  }
  std::string refusal() {
    return message_of<std::invalid_argument>([&] { resume(); });
  }
  void start_over() {
    QuantizeCheckpointOptions options;
    options.force = true;
    quantize_checkpoint(folder_ / "m", folder_ / "q", {}, options);
    EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
    EXPECT_THAT(folder_.names(), ElementsAre("m", "q"));
  }

  TempFolder folder_;
  std::map<std::string, std::string> expected_;
};

TEST_F(Finished, NothingIsLeftToDo) {
  const fs::file_time_type before = fs::last_write_time(folder_ / "q" / kShard);
  resume();
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
  EXPECT_EQ(fs::last_write_time(folder_ / "q" / kShard), before);
  EXPECT_THAT(folder_.names(), ElementsAre("m", "q"));
}

TEST_F(Finished, ALostFileIsNamed) {
  fs::remove(folder_ / "q" / kShard);
  EXPECT_THAT(refusal(), AllOf(HasSubstr("damaged"), HasSubstr(kShard), HasSubstr("is missing"),
                               HasSubstr("use force")));
  start_over();
}

TEST_F(Finished, AFlippedBitIsFound) {
  const fs::path file = folder_ / "q" / kShard;
  std::string bytes = read_bytes(file);
  bytes[bytes.size() / 2] ^= 1;
  write_bytes(file, bytes);
  EXPECT_THAT(refusal(), AllOf(HasSubstr(kShard), HasSubstr("was changed")));
  start_over();
}

TEST_F(Finished, ACutFileIsFound) {
  const std::string bytes = read_bytes(folder_ / "q/config.json");
  write_bytes(folder_ / "q/config.json", bytes.substr(0, 10));
  EXPECT_THAT(refusal(), AllOf(HasSubstr("config.json"), HasSubstr("has 10 bytes instead of")));
}

// Weights of another training step: same names, shapes and sizes.
TEST_F(Finished, AChangedSourceIsNamed) {
  const fs::path shard = folder_ / "m" / kShard;
  const fs::file_time_type time = fs::last_write_time(shard);
  std::string bytes = read_bytes(shard);
  bytes[bytes.size() - 3] ^= 1;
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  write_bytes(shard, bytes);
  EXPECT_THAT(refusal(),
              AllOf(HasSubstr(kShard), HasSubstr("was changed"), HasSubstr("use force")));
  // A tool that sets the old time again does not hide it.
  fs::last_write_time(shard, time);
  EXPECT_THAT(refusal(), HasSubstr(kShard));
}

TEST_F(Finished, AFolderOfSomebodyElseStays) {
  fs::create_directories(folder_ / "q.partial");
  write_bytes(folder_ / "q.partial/thesis.txt", "my notes");
  EXPECT_THAT(refusal(), AllOf(HasSubstr("q.partial"), HasSubstr("not a checkpoint folder")));
  EXPECT_EQ(read_bytes(folder_ / "q.partial/thesis.txt"), "my notes");
  // What a killed run has left goes, also when it was killed while it wrote its first file.
  for (const char* name : {kJournalName, ".hqq_cpp.journal.json.0123456789abcdef.hqq-tmp"}) {
    fs::remove_all(folder_ / "q.partial");
    fs::create_directories(folder_ / "q.partial");
    write_bytes(folder_ / "q.partial" / name, "{}");
    resume();
    EXPECT_THAT(folder_.names(), ElementsAre("m", "q"));
  }
}

TEST_F(Finished, CleaningUpFailsAfterTheResultIsInPlace) {
  fs::create_directories(folder_ / "q/sub");
  write_bytes(folder_ / "q/sub/old", "old");
  ::chmod((folder_ / "q/sub").c_str(), 0555);
  const auto refused = [&] {
    const std::string message = message_of<std::system_error>([&] { start_over(); });
    EXPECT_THAT(message, AllOf(HasSubstr("is written and in place"), HasSubstr("q.partial")));
  };
  if (::geteuid() != 0) {
    refused();
  } else {
    // Root may remove everything: a child process becomes nobody.
    constexpr uid_t kNobody = 65534;
    ASSERT_EQ(::chown(folder_.path().c_str(), kNobody, kNobody), 0);
    for (const auto& entry : fs::recursive_directory_iterator(folder_.path())) {
      ASSERT_EQ(::chown(entry.path().c_str(), kNobody, kNobody), 0);
    }
    const pid_t child = ::fork();
    if (child == 0) {
      const bool ready = ::setuid(kNobody) == 0;
      if (ready) refused();
      ::_exit(ready && !HasFailure() ? 0 : 1);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
  }
  EXPECT_TRUE(same_contents(contents_of(folder_ / "q"), expected_));
  EXPECT_TRUE(fs::exists(folder_ / "q.partial/sub/old"));
  ::chmod((folder_ / "q.partial/sub").c_str(), 0755);
}

// ---- The lock ----------------------------------------------------------------------------------

TEST(FolderLockTest, OneHolder) {
  TempFolder folder;
  {
    const FolderLock lock(folder / "q", "test");
    EXPECT_THAT(message_of<std::invalid_argument>([&] { FolderLock(folder / "q", "test"); }),
                HasSubstr("another process is writing to"));
    const FolderLock other(folder / "r", "test");
  }
  EXPECT_THAT(folder.names(), ElementsAre());
}

TEST(FolderLockTest, TheFileOfAKilledProcessIsTakenOver) {
  TempFolder folder;
  write_bytes(lock_path(folder / "q"), "");
  {
    const FolderLock lock(folder / "q", "test");
  }
  EXPECT_THAT(folder.names(), ElementsAre());
}

TEST(FolderLockTest, NoLinkIsFollowed) {
  TempFolder folder;
  fs::create_symlink(folder / "elsewhere", lock_path(folder / "q"));
  EXPECT_THROW(FolderLock(folder / "q", "test"), std::system_error);
  EXPECT_FALSE(fs::exists(folder / "elsewhere"));
}

// A lock whose file was removed meanwhile guards nothing: at no moment are there two holders.
TEST(FolderLockTest, ManyAtOnce) {
  TempFolder folder;
  std::atomic<int> holders{0}, taken{0}, most{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 500; ++i) {
        try {
          const FolderLock lock(folder / "q", "test");
          most = std::max(most.load(), ++holders);
          ++taken;
          --holders;
        } catch (const std::invalid_argument&) {
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(most, 1);
  EXPECT_GT(taken, 4);
  EXPECT_THAT(folder.names(), ElementsAre());
}

// Several runs with resume at one destination: each one ends well or says that another is at work,
// and what has the name is whole.
TEST(SeveralProcesses, EndWithOneResult) {
  TempFolder folder;
  save_model(folder / "m", sharded_model());
  quantize_checkpoint(folder / "m", folder / "whole", {});
  const auto expected = contents_of(folder / "whole");
  const char* const longer = std::getenv("HQQ_LONG_TESTS");
  const int rounds = longer != nullptr ? 500 : 15;
  for (int round = 0; round < rounds; ++round) {
    std::array<pid_t, 4> children{};
    for (std::size_t c = 0; c < children.size(); ++c) {
      children[c] = ::fork();
      if (children[c] != 0) continue;
      ::usleep(static_cast<useconds_t>(300 * c * static_cast<std::size_t>(round % 7)));
      int code = 1;
      try {
        QuantizeCheckpointOptions options;
        options.resume = true;
        options.threads = 1;
        quantize_checkpoint(folder / "m", folder / "q", {}, options);
        code = 0;
      } catch (const std::invalid_argument& error) {
        const std::string text = error.what();
        code = text.find("another process is writing to") != std::string::npos ? 2 : 3;
      } catch (...) {
        code = 4;
      }
      ::_exit(code);
    }
    int done = 0;
    for (const pid_t child : children) {
      int status = 0;
      ::waitpid(child, &status, 0);
      ASSERT_TRUE(WIFEXITED(status));
      const int code = WEXITSTATUS(status);
      ASSERT_TRUE(code == 0 || code == 2) << "round " << round << ", exit code " << code;
      done += code == 0 ? 1 : 0;
    }
    ASSERT_GE(done, 1);
    ASSERT_TRUE(same_contents(contents_of(folder / "q"), expected)) << "round " << round;
    ASSERT_THAT(folder.names(), ElementsAre("m", "q", "whole"));
    fs::remove_all(folder / "q");
  }
}

}  // namespace
}  // namespace hqq
