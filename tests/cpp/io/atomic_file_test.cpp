#include "src/io/atomic_file.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <system_error>

#include "hqq/error.hpp"
#include "tests/cpp/support/io_test_util.hpp"
#include "tests/cpp/support/message_of.hpp"

namespace hqq {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::message_of;
using testing::read_bytes;
using testing::TempFolder;
using testing::write_bytes;

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

// Runs `body` in a child process, whose limits and death do not concern this one; its wait status.
template <class Body>
int in_child(Body&& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    int code = 99;
    try {
      code = body();
    } catch (...) {
    }
    ::_exit(code);
  }
  int status = -1;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return status;
}

TEST(AtomicFile, AppearsOnlyAfterCommit) {
  const TempFolder folder;
  AtomicFile file(folder / "a.bin");
  file.write("hello ");
  file.write("world");
  EXPECT_FALSE(std::filesystem::exists(folder / "a.bin"));
  ASSERT_EQ(folder.names().size(), 1u);
  EXPECT_TRUE(is_temporary_file_name(folder.names()[0])) << folder.names()[0];
  file.commit();
  EXPECT_THAT(folder.names(), ElementsAre("a.bin"));
  EXPECT_EQ(read_bytes(folder / "a.bin"), "hello world");
  EXPECT_EQ(file.size(), 11u);
  EXPECT_EQ(file.hash(), hash_file(folder / "a.bin"));
}

TEST(AtomicFile, ReplacesAnExistingFileAsAWhole) {
  const TempFolder folder;
  write_bytes(folder / "a", "old");
  {
    AtomicFile file(folder / "a");
    file.write("new, but given up");
    EXPECT_EQ(read_bytes(folder / "a"), "old");
  }
  EXPECT_EQ(read_bytes(folder / "a"), "old");
  write_file_atomically(folder / "a", "new");
  EXPECT_EQ(read_bytes(folder / "a"), "new");
  EXPECT_THAT(folder.names(), ElementsAre("a"));
}

TEST(AtomicFile, WithoutCommitLeavesNothing) {
  const TempFolder folder;
  {
    AtomicFile(folder / "a").write("x");
  }
  EXPECT_THAT(folder.names(), IsEmpty());
  AtomicFile file(folder / "b");
  file.discard();
  EXPECT_THAT(folder.names(), IsEmpty());
  EXPECT_THROW(file.write("x"), std::logic_error);
  EXPECT_THROW(file.commit(), std::logic_error);
}

TEST(AtomicFile, TwoWritersOfOneNameDoNotMeet) {
  const TempFolder folder;
  AtomicFile first(folder / "a");
  AtomicFile second(folder / "a");
  EXPECT_NE(first.temporary_path(), second.temporary_path());
  first.write("first");
  second.write("second");
  first.commit();
  EXPECT_EQ(read_bytes(folder / "a"), "first");
  second.commit();
  EXPECT_EQ(read_bytes(folder / "a"), "second");
  EXPECT_THAT(folder.names(), ElementsAre("a"));
}

TEST(AtomicFile, FileInTheWorkingFolder) {
  const TempFolder folder;
  const int status = in_child([&] {
    std::filesystem::current_path(folder.path());
    write_file_atomically("plain", "x");
    return 0;
  });
  EXPECT_EQ(status, 0);
  EXPECT_THAT(folder.names(), ElementsAre("plain"));
}

TEST(AtomicFile, LongNamesStayWithinTheLimit) {
  const TempFolder folder;
  const std::string name(255, 'n');
  write_file_atomically(folder / name, "x");
  EXPECT_THAT(folder.names(), ElementsAre(name));
}

TEST(AtomicFile, RespectsTheUmask) {
  const TempFolder folder;
  const mode_t mask = ::umask(027);
  write_file_atomically(folder / "a", "x");
  ::umask(mask);
  struct stat status = {};
  ASSERT_EQ(::stat((folder / "a").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0640u);
}

TEST(AtomicFile, NamesWhatItCannotCreate) {
  const TempFolder folder;
  const auto path = folder / "gone" / "a.bin";
  try {
    AtomicFile file(path);
    FAIL() << "created a file in a folder that does not exist";
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code().value(), ENOENT);
    EXPECT_THAT(error.what(), HasSubstr("[write] cannot create \"" + path.string() + "\""));
  }
  for (const char* name : {"", ".", "..", "folder/"}) {
    EXPECT_THAT(message_of<std::invalid_argument>([&] { AtomicFile file(name); }),
                HasSubstr("is not the name of a file"));
  }
}

TEST(AtomicFile, FolderInTheWayIsAnErrorAndLeavesNothing) {
  const TempFolder folder;
  std::filesystem::create_directory(folder / "a");
  EXPECT_THAT(message_of<std::system_error>([&] { write_file_atomically(folder / "a", "x"); }),
              HasSubstr("[write] cannot rename to"));
  EXPECT_THAT(folder.names(), ElementsAre("a"));
}

TEST(AtomicFile, DiskFullIsAnErrorAndLeavesNothing) {
  const TempFolder folder;
  const std::string path = (folder / "big.bin").string();
  const int status = in_child([&] {
    // A write across the limit is short, and the next one fails: the same as on a full disk.
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {10'000, 10'000};
    if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 1;
    try {
      AtomicFile file(path);
      file.write(std::string(4'000, 'x'));
      file.write(std::string(60'000, 'x'));
      return 2;
    } catch (const std::system_error& error) {
      if (error.code().value() != EFBIG) return 3;
      if (std::strstr(error.what(), path.c_str()) == nullptr) return 4;
    }
    return std::filesystem::is_empty(folder.path()) ? 0 : 5;
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_THAT(folder.names(), IsEmpty());
}

TEST(AtomicFile, KilledBeforeCommitLeavesOnlyATemporaryFile) {
  const TempFolder folder;
  const int status = in_child([&] {
    AtomicFile file(folder / "a.bin");
    file.write("half of it");
    ::raise(SIGKILL);
    return 0;
  });
  ASSERT_TRUE(WIFSIGNALED(status));
  ASSERT_EQ(folder.names().size(), 1u);
  EXPECT_TRUE(is_temporary_file_name(folder.names()[0])) << folder.names()[0];
  // The next run is not stopped by it.
  write_file_atomically(folder / "a.bin", "all of it");
  EXPECT_EQ(read_bytes(folder / "a.bin"), "all of it");
}

TEST(AtomicFile, TemporaryNames) {
  EXPECT_TRUE(is_temporary_file_name(".model.safetensors.0123456789abcdef.hqq-tmp"));
  for (const char* name : {"model.safetensors", "a.hqq-tmp", ".hidden", ".hqq-tmp.txt", ""}) {
    EXPECT_FALSE(is_temporary_file_name(name)) << name;
  }
}

// Reference values of the package python-xxhash: xxh3_128_hexdigest(b"") and (b"hqq").
TEST(Hash, IsXxh3InBigEndianHex) {
  EXPECT_EQ(xxh3_hex({}), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(xxh3_hex(bytes_of("hqq")), "4361bbe2e8de7f166c1abf22deead2d3");
}

TEST(Hash, StreamEqualsOneCallForEveryCut) {
  std::string text(3'000, '\0');
  for (std::size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * 31 + i / 7);
  const std::string whole = xxh3_hex(bytes_of(text));
  for (std::size_t cut = 0; cut <= text.size(); cut += 97) {
    Xxh3Stream stream;
    stream.update(bytes_of(text).first(cut));
    stream.update({});
    stream.update(bytes_of(text).subspan(cut));
    ASSERT_EQ(stream.hex(), whole) << cut;
  }
  text[1'500] ^= 1;
  EXPECT_NE(xxh3_hex(bytes_of(text)), whole);
}

TEST(Hash, FileInPiecesWithProgress) {
  const TempFolder folder;
  const std::string text(3'500'000, 'q');
  write_bytes(folder / "a", text);
  std::uint64_t seen = 0;
  int calls = 0;
  const std::string hash = hash_file(folder / "a", [&](std::uint64_t bytes) {
    seen += bytes;
    ++calls;
  });
  EXPECT_EQ(hash, xxh3_hex(bytes_of(text)));
  EXPECT_EQ(seen, text.size());
  EXPECT_GT(calls, 1);
  EXPECT_THROW(hash_file(folder / "a", [](std::uint64_t) { throw Interrupted("stop"); }),
               Interrupted);
}

TEST(Hash, MissingFileAndFolder) {
  const TempFolder folder;
  EXPECT_THAT(message_of<std::system_error>([&] { hash_file(folder / "gone"); }),
              HasSubstr("[read] cannot open"));
  EXPECT_THAT(message_of<FormatError>([&] { hash_file(folder.path()); }),
              HasSubstr("is a folder, but a regular file is needed"));
}

TEST(ReadTextFile, WholeFileWithinTheLimit) {
  const TempFolder folder;
  const std::string text("a\0b\n", 4);
  write_bytes(folder / "a", text);
  EXPECT_EQ(read_text_file(folder / "a"), text);
  EXPECT_EQ(read_text_file(folder / "a", 4), text);
  EXPECT_THAT(message_of<FormatError>([&] { read_text_file(folder / "a", 3); }),
              HasSubstr("has 4 bytes, more than the 3 allowed"));
}

TEST(ReadTextFile, PipeDoesNotBlock) {
  const TempFolder folder;
  ASSERT_EQ(::mkfifo((folder / "p").c_str(), 0600), 0);
  EXPECT_THAT(message_of<FormatError>([&] { read_text_file(folder / "p"); }),
              HasSubstr("is a pipe, but a regular file is needed"));
  EXPECT_THAT(message_of<FormatError>([&] { read_text_file("/dev/null"); }),
              HasSubstr("is a device or socket"));
}

}  // namespace
}  // namespace hqq
