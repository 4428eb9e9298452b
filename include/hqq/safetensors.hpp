// Safetensors files: a reader that trusts nothing and a writer that streams.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "hqq/dtype.hpp"
#include "hqq/tensor.hpp"

namespace hqq {

// One entry of a header. Offsets count from the start of the data section.
struct TensorInfo {
  std::string name;
  DType dtype = DType::kU8;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;

  std::uint64_t nbytes() const { return end - begin; }
};

// An open, fully validated file. Reading is thread safe (pread).
class SafetensorsFile {
 public:
  // Throws FormatError for a file that breaks any rule of the format (header length, JSON,
  // duplicate keys, dtype, shape, offsets that do not tile the data section, trailing bytes) and
  // std::system_error when it cannot be read.
  explicit SafetensorsFile(const std::filesystem::path& path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;

  const std::filesystem::path& path() const;
  // In the order of their data.
  const std::vector<TensorInfo>& tensors() const;
  // nullptr when there is no such tensor.
  const TensorInfo* find(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const;
  std::uint64_t file_size() const;

  // Copies `out.size()` bytes of a tensor, from byte `offset` of it. Throws FormatError when the
  // range leaves the tensor or the file has been truncated since.
  void read(const TensorInfo& info, std::uint64_t offset, std::span<std::byte> out) const;
  // The whole tensor, owned.
  Tensor read(const TensorInfo& info) const;
  // The whole tensor as a view of a private, read-only memory map of the file (no copy).
  Tensor map(const TensorInfo& info) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Writes one file: the header at once, then the tensors' bytes in order, then fsync and rename. The
// file appears under its name only after finish(); a writer destroyed before that removes its
// temporary file.
class SafetensorsWriter {
 public:
  // `tensors` in the order their bytes will come; begin/end are computed here. Throws
  // std::invalid_argument for a duplicate name or an invalid shape, std::system_error from the OS.
  SafetensorsWriter(const std::filesystem::path& path, std::vector<TensorInfo> tensors,
                    const std::map<std::string, std::string>& metadata);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // Appends bytes; the total must equal the sum of the tensors' sizes.
  void write(std::span<const std::byte> bytes);
  // Throws std::logic_error when bytes are missing or too many, std::system_error from the OS.
  void finish();
  // 128-bit xxHash3 of the whole file as 32 hex digits; valid after finish().
  std::string file_hash() const;
  std::uint64_t file_size() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Writes a file of complete tensors at once.
void save_safetensors(const std::filesystem::path& path,
                      const std::vector<std::pair<std::string, const Tensor*>>& tensors,
                      const std::map<std::string, std::string>& metadata = {});

}  // namespace hqq
