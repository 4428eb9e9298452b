// One process at a time at a destination.
#pragma once

#include <filesystem>
#include <string>

namespace hqq {

// "<destination>.partial.lock". Beside the folders, not inside of one: they are renamed and removed
// while the lock is held.
std::filesystem::path lock_path(const std::filesystem::path& destination);

// Held from construction to destruction, which removes the file. The system releases the lock of a
// process that dies; its file stays, and the next run takes it over.
class FolderLock {
 public:
  // Throws std::invalid_argument when another process holds it, with `where` in front, and
  // std::system_error when the file cannot be made.
  FolderLock(const std::filesystem::path& destination, const std::string& where);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  std::filesystem::path path_;
  int fd_ = -1;
};

}  // namespace hqq
