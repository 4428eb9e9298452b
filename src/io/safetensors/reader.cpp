#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <unordered_map>

#include "hqq/error.hpp"
#include "hqq/safetensors.hpp"
#include "src/base/json.hpp"
#include "src/io/atomic_file.hpp"
#include "src/io/safetensors/header.hpp"

namespace hqq {

struct SafetensorsFile::Impl {
  std::filesystem::path path;
  std::string file;  // the path as messages show it
  int fd = -1;
  std::uint64_t file_size = 0;
  std::uint64_t data_begin = 0;
  SafetensorsHeader header;
  std::unordered_map<std::string_view, std::size_t> index;

  ~Impl() {
    if (fd >= 0) ::close(fd);
  }

  [[noreturn]] void truncated(std::uint64_t position) const {
    throw_format("safetensors", file + ": the file ends at byte " + std::to_string(position) +
                                    ", but it had " + std::to_string(file_size) +
                                    " bytes when it was opened");
  }

  // Fills `out` from byte `position` of the file.
  void read_exactly(std::uint64_t position, std::span<std::byte> out) const {
    while (!out.empty()) {
      const ssize_t count = ::pread(fd, out.data(), out.size(), static_cast<off_t>(position));
      if (count < 0) {
        if (errno == EINTR) continue;
        throw_errno("safetensors", "read", path);
      }
      if (count == 0) truncated(position);
      position += static_cast<std::uint64_t>(count);
      out = out.subspan(static_cast<std::size_t>(count));
    }
  }

  // `info` may come from another file or from the caller.
  void check_range(const TensorInfo& info, std::uint64_t offset, std::uint64_t size) const {
    const std::uint64_t data_size = file_size - data_begin;
    if (info.begin > info.end || info.end > data_size || offset > info.nbytes() ||
        size > info.nbytes() - offset) {
      throw_format("safetensors",
                   file + ": " + std::to_string(size) + " bytes from byte " +
                       std::to_string(offset) + " leave tensor " + quote_text(info.name) +
                       " at bytes " + std::to_string(info.begin) + " to " +
                       std::to_string(info.end) + " of " + std::to_string(data_size));
    }
  }
};

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path)
    : impl_(std::make_unique<Impl>()) {
  impl_->path = path;
  impl_->file = quote_text(path.string());
  impl_->fd = open_regular_file(path, impl_->file_size);

  std::byte prefix[kHeaderLengthBytes] = {};
  const std::size_t available = std::min(impl_->file_size, kHeaderLengthBytes);
  impl_->read_exactly(0, std::span(prefix).first(available));
  const std::uint64_t length =
      parse_header_length(std::span(prefix).first(available), impl_->file_size, impl_->file);
  std::string text(length, '\0');
  impl_->read_exactly(kHeaderLengthBytes, std::as_writable_bytes(std::span(text)));
  impl_->data_begin = kHeaderLengthBytes + length;
  impl_->header = parse_safetensors_header(text, impl_->file_size - impl_->data_begin, impl_->file);
  for (std::size_t i = 0; i < impl_->header.tensors.size(); ++i) {
    impl_->index.emplace(impl_->header.tensors[i].name, i);
  }
}

SafetensorsFile::~SafetensorsFile() = default;
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;

const std::filesystem::path& SafetensorsFile::path() const { return impl_->path; }
const std::vector<TensorInfo>& SafetensorsFile::tensors() const { return impl_->header.tensors; }
const std::map<std::string, std::string>& SafetensorsFile::metadata() const {
  return impl_->header.metadata;
}
std::uint64_t SafetensorsFile::file_size() const { return impl_->file_size; }

const TensorInfo* SafetensorsFile::find(const std::string& name) const {
  const auto found = impl_->index.find(name);
  return found == impl_->index.end() ? nullptr : &impl_->header.tensors[found->second];
}

void SafetensorsFile::read(const TensorInfo& info, std::uint64_t offset,
                           std::span<std::byte> out) const {
  impl_->check_range(info, offset, out.size());
  impl_->read_exactly(impl_->data_begin + info.begin + offset, out);
}

Tensor SafetensorsFile::read(const TensorInfo& info) const {
  impl_->check_range(info, 0, info.nbytes());
  Tensor tensor{info.dtype, info.shape, Buffer::allocate(info.nbytes())};
  read(info, 0, std::span(tensor.buffer.data, tensor.buffer.size));
  return tensor;
}

Tensor SafetensorsFile::map(const TensorInfo& info) const {
  impl_->check_range(info, 0, info.nbytes());
  const std::uint64_t position = impl_->data_begin + info.begin;
  // A map costs more than a small copy, and a misaligned one cannot be read through a typed
  // pointer.
  constexpr std::uint64_t kSmallest = 64 * 1024;
  if (info.nbytes() < kSmallest || position % dtype_size(info.dtype) != 0) return read(info);
  // Touching a page beyond the end would kill the process.
  struct stat status = {};
  if (::fstat(impl_->fd, &status) != 0) throw_errno("safetensors", "stat", impl_->path);
  if (static_cast<std::uint64_t>(status.st_size) < impl_->file_size) {
    impl_->truncated(static_cast<std::uint64_t>(status.st_size));
  }
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::uint64_t start = position / page * page;
  const std::size_t length = position - start + info.nbytes();
  // Writable, as a private copy: torch takes tensors without asking whether it may write to them.
  void* memory = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE,
                        impl_->fd, static_cast<off_t>(start));
  // The number of maps of a process is limited (65530 by default), and some file systems have none.
  if (memory == MAP_FAILED) return read(info);
  std::shared_ptr<void> owner(memory, [length](void* mapped) { ::munmap(mapped, length); });
  auto* data = static_cast<std::byte*>(memory) + (position - start);
  return {info.dtype, info.shape, Buffer{std::move(owner), data, info.nbytes()}};
}

}  // namespace hqq
