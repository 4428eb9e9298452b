#include "src/io/checkpoint/folder_lock.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "hqq/error.hpp"
#include "src/base/json.hpp"
#include "src/io/atomic_file.hpp"

namespace hqq {
namespace {

// Whether the descriptor is that of the file that has the name now. The process that had the lock
// may have removed its file between our open() and our flock(): then we hold a lock that nobody
// else will look at.
bool is_file_at(int fd, const std::filesystem::path& path) {
  struct stat held, named;
  return ::fstat(fd, &held) == 0 && ::stat(path.c_str(), &named) == 0 &&
         held.st_dev == named.st_dev && held.st_ino == named.st_ino;
}

}  // namespace

std::filesystem::path lock_path(const std::filesystem::path& destination) {
  std::filesystem::path path = destination;
  path += ".partial.lock";
  return path;
}

FolderLock::FolderLock(const std::filesystem::path& destination, const std::string& where)
    : path_(lock_path(destination)) {
  while (fd_ < 0) {
    // Not through a link, and without waiting for the other end of a pipe.
    const int fd =
        ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
    if (fd < 0 && errno == EINTR) continue;
    if (fd < 0) throw_errno(where, "create", path_);
    if (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
      const int error = errno;
      ::close(fd);
      if (error == EINTR) continue;
      if (error == EWOULDBLOCK) {
        throw_invalid(where, "another process is writing to " + quote_text(destination.string()) +
                                 "; wait for it or stop it");
      }
      errno = error;
      throw_errno(where, "lock", path_);
    }
    if (is_file_at(fd, path_)) {
      fd_ = fd;
    } else {
      ::close(fd);
    }
  }
}

FolderLock::~FolderLock() {
  // In this order: whoever finds the file finds it locked.
  ::unlink(path_.c_str());
  ::close(fd_);
}

}  // namespace hqq
