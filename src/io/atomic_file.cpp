#include "src/io/atomic_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <random>
#include <system_error>
#include <utility>
#include <vector>

#include "hqq/error.hpp"
#include "src/base/json.hpp"

namespace hqq {
namespace {

constexpr std::string_view kTemporarySuffix = ".hqq-tmp";

struct Descriptor {
  int fd;
  ~Descriptor() { ::close(fd); }
};

std::filesystem::path folder_of(const std::filesystem::path& path) {
  const std::filesystem::path parent = path.parent_path();
  return parent.empty() ? std::filesystem::path(".") : parent;
}

// Unpredictable, so that a file left behind by a killed process never stops a new one.
std::string temporary_name(const std::string& name) {
  static std::atomic<std::uint32_t> counter = std::random_device{}();
  const auto tag = (static_cast<std::uint64_t>(::getpid()) << 32) | counter.fetch_add(1);
  char digits[20];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(tag));
  // Names end at 255 bytes on most file systems.
  std::string result(1, '.');
  result.append(name, 0, 200).append(1, '.').append(digits).append(kTemporarySuffix);
  return result;
}

}  // namespace

void throw_errno(const std::string& where, const std::string& action,
                 const std::filesystem::path& path) {
  const int error = errno;
  throw std::system_error(error, std::generic_category(),
                          "[" + where + "] cannot " + action + " " + quote_text(path.string()));
}

struct Xxh3Stream::State {
  XXH3_state_t xxh;
};

Xxh3Stream::Xxh3Stream() : state_(new State) { XXH3_128bits_reset(&state_->xxh); }
Xxh3Stream::~Xxh3Stream() = default;
Xxh3Stream::Xxh3Stream(Xxh3Stream&&) noexcept = default;
Xxh3Stream& Xxh3Stream::operator=(Xxh3Stream&&) noexcept = default;

void Xxh3Stream::update(std::span<const std::byte> bytes) {
  // An empty span may have a null pointer.
  if (!bytes.empty()) XXH3_128bits_update(&state_->xxh, bytes.data(), bytes.size());
}

std::string Xxh3Stream::hex() const {
  const XXH128_hash_t hash = XXH3_128bits_digest(&state_->xxh);
  char digits[33];
  std::snprintf(digits, sizeof digits, "%016llx%016llx",
                static_cast<unsigned long long>(hash.high64),
                static_cast<unsigned long long>(hash.low64));
  return digits;
}

AtomicFile::AtomicFile(std::filesystem::path path) : path_(std::move(path)) {
  const std::string name = path_.filename().string();
  if (name.empty() || name == "." || name == "..") {
    throw_invalid("write", quote_text(path_.string()) + " is not the name of a file");
  }
  for (int attempt = 0; fd_ < 0; ++attempt) {
    temporary_ = folder_of(path_) / temporary_name(name);
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd_ < 0 && errno != EINTR && (errno != EEXIST || attempt >= 100)) {
      throw_errno("write", "create", path_);
    }
  }
}

AtomicFile::~AtomicFile() { discard(); }

void AtomicFile::discard() noexcept {
  if (fd_ >= 0) ::close(std::exchange(fd_, -1));
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
  temporary_.clear();
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  if (fd_ < 0) throw std::logic_error("[write] the file is closed: " + quote_text(path_.string()));
  hash_.update(bytes);
  while (!bytes.empty()) {
    const ssize_t count = ::write(fd_, bytes.data(), bytes.size());
    if (count < 0) {
      if (errno == EINTR) continue;
      throw_errno("write", "write", path_);
    }
    size_ += static_cast<std::uint64_t>(count);
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
}

void AtomicFile::write(std::string_view text) {
  write(std::as_bytes(std::span(text.data(), text.size())));
}

void AtomicFile::commit() {
  if (fd_ < 0) throw std::logic_error("[write] the file is closed: " + quote_text(path_.string()));
  while (::fsync(fd_) != 0) {
    if (errno != EINTR) throw_errno("write", "write", path_);
  }
  // Network file systems report a full disk only here.
  if (::close(std::exchange(fd_, -1)) != 0 && errno != EINTR) throw_errno("write", "write", path_);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) throw_errno("write", "rename to", path_);
  temporary_.clear();
  sync_directory(folder_of(path_));
}

bool is_temporary_file_name(const std::string& name) {
  return name.starts_with('.') && name.ends_with(kTemporarySuffix);
}

void write_file_atomically(const std::filesystem::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

void sync_directory(const std::filesystem::path& folder) {
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) throw_errno("write", "open", folder);
  const Descriptor descriptor{fd};
  while (::fsync(fd) != 0) {
    // Some file systems cannot sync a folder and say so with EINVAL: nothing more can be done
    // there.
    if (errno == EINVAL || errno == ENOTSUP) return;
    if (errno != EINTR) throw_errno("write", "sync", folder);
  }
}

int open_regular_file(const std::filesystem::path& path, std::uint64_t& size) {
  // O_NONBLOCK: opening a pipe would wait for a writer.
  int fd = -1;
  do {
    fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) throw_errno("read", "open", path);
  struct stat status = {};
  if (::fstat(fd, &status) != 0) {
    const int error = errno;
    ::close(fd);
    errno = error;
    throw_errno("read", "stat", path);
  }
  if (!S_ISREG(status.st_mode)) {
    ::close(fd);
    throw_format("read", quote_text(path.string()) + " is " +
                             (S_ISDIR(status.st_mode)    ? "a folder"
                              : S_ISFIFO(status.st_mode) ? "a pipe"
                                                         : "a device or socket") +
                             ", but a regular file is needed");
  }
  size = static_cast<std::uint64_t>(status.st_size);
  return fd;
}

std::string hash_file(const std::filesystem::path& path,
                      const std::function<void(std::uint64_t)>& progress) {
  std::uint64_t size = 0;
  const Descriptor descriptor{open_regular_file(path, size)};
  constexpr std::size_t kChunk = 1 << 20;
  std::vector<std::byte> chunk(kChunk);
  Xxh3Stream hash;
  while (true) {
    const ssize_t count = ::read(descriptor.fd, chunk.data(), chunk.size());
    if (count < 0) {
      if (errno == EINTR) continue;
      throw_errno("read", "read", path);
    }
    if (count == 0) return hash.hex();
    hash.update(std::span(chunk).first(static_cast<std::size_t>(count)));
    if (progress) progress(static_cast<std::uint64_t>(count));
  }
}

std::string xxh3_hex(std::span<const std::byte> bytes) {
  Xxh3Stream hash;
  hash.update(bytes);
  return hash.hex();
}

std::string read_text_file(const std::filesystem::path& path, std::uint64_t max_bytes) {
  std::uint64_t size = 0;
  const Descriptor descriptor{open_regular_file(path, size)};
  if (size > max_bytes) {
    throw_format("read", quote_text(path.string()) + " has " + std::to_string(size) +
                             " bytes, more than the " + std::to_string(max_bytes) + " allowed");
  }
  std::string text(static_cast<std::size_t>(size), '\0');
  std::size_t filled = 0;
  while (filled < text.size()) {
    const ssize_t count = ::read(descriptor.fd, text.data() + filled, text.size() - filled);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw_errno("read", "read", path);
    if (count == 0) break;
    filled += static_cast<std::size_t>(count);
  }
  text.resize(filled);
  return text;
}

}  // namespace hqq
