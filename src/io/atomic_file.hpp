// Files that appear under their name only when they are whole, and hashes of files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace hqq {

// 128-bit xxHash3 of a stream of bytes.
class Xxh3Stream {
 public:
  Xxh3Stream();
  ~Xxh3Stream();
  Xxh3Stream(Xxh3Stream&&) noexcept;
  Xxh3Stream& operator=(Xxh3Stream&&) noexcept;

  void update(std::span<const std::byte> bytes);
  // 32 lower-case hex digits, most significant first, as xxhsum -H2 prints them.
  std::string hex() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Writes to a temporary file in the folder of `path`; commit() makes it durable and renames it.
// Without commit() the destructor removes it. All errors of the system are std::system_error with
// the file name.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  // fsync, rename, fsync of the folder.
  void commit();
  // Removes the temporary file now; commit() is no longer possible.
  void discard() noexcept;

  const std::filesystem::path& path() const { return path_; }
  const std::filesystem::path& temporary_path() const { return temporary_; }
  // Size and hash of everything written so far.
  std::uint64_t size() const { return size_; }
  std::string hash() const { return hash_.hex(); }

 private:
  std::filesystem::path path_;
  std::filesystem::path temporary_;
  int fd_ = -1;
  std::uint64_t size_ = 0;
  Xxh3Stream hash_;
};

// True for names that AtomicFile gives to temporary files; a killed process may leave one behind.
bool is_temporary_file_name(const std::string& name);

void write_file_atomically(const std::filesystem::path& path, std::string_view text);

// Makes renames and new entries of a folder durable.
void sync_directory(const std::filesystem::path& folder);

// Hash of a whole file. `progress` gets the bytes read since its last call; it may throw to stop.
std::string hash_file(const std::filesystem::path& path,
                      const std::function<void(std::uint64_t)>& progress = {});
std::string xxh3_hex(std::span<const std::byte> bytes);

// The whole of a small file. Throws FormatError when it is larger than `max_bytes` or not a regular
// file.
std::string read_text_file(const std::filesystem::path& path,
                           std::uint64_t max_bytes = 100'000'000);

// Opens a regular file for reading and gives its size. Folders, pipes and devices are a FormatError
// that says what they are; nothing here blocks. The caller closes the descriptor.
int open_regular_file(const std::filesystem::path& path, std::uint64_t& size);

// Throws std::system_error "[<where>] cannot <action> <path>" for the current errno.
[[noreturn]] void throw_errno(const std::string& where, const std::string& action,
                              const std::filesystem::path& path);

}  // namespace hqq
