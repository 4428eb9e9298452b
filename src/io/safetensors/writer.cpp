#include <stdexcept>

#include "hqq/error.hpp"
#include "hqq/safetensors.hpp"
#include "src/base/json.hpp"
#include "src/io/atomic_file.hpp"
#include "src/io/safetensors/header.hpp"

namespace hqq {

struct SafetensorsWriter::Impl {
  explicit Impl(const std::filesystem::path& path) : file(path) {}

  AtomicFile file;
  std::uint64_t data_size = 0;
  std::uint64_t written = 0;  // of the data
  bool finished = false;

  // The caller's mistake, not a broken file.
  [[noreturn]] void wrong_size(std::uint64_t got) const {
    throw std::logic_error("[safetensors] " + quote_text(file.path().string()) +
                           ": the tensors take " + std::to_string(data_size) + " bytes, but " +
                           std::to_string(got) + " were written");
  }
};

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& path,
                                     std::vector<TensorInfo> tensors,
                                     const std::map<std::string, std::string>& metadata) {
  // Everything that can be wrong with the arguments is found before a file exists.
  const std::string file = quote_text(path.string());
  const std::uint64_t data_size = assign_offsets(tensors, file);
  const std::string header = format_safetensors_header(tensors, metadata, file);
  impl_ = std::make_unique<Impl>(path);
  impl_->data_size = data_size;
  impl_->file.write(header);
}

SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::write(std::span<const std::byte> bytes) {
  if (bytes.size() > impl_->data_size - impl_->written) {
    impl_->wrong_size(impl_->written + bytes.size());
  }
  impl_->file.write(bytes);
  impl_->written += bytes.size();
}

void SafetensorsWriter::finish() {
  if (impl_->written != impl_->data_size) impl_->wrong_size(impl_->written);
  impl_->file.commit();
  impl_->finished = true;
}

std::string SafetensorsWriter::file_hash() const {
  if (!impl_->finished) {
    throw std::logic_error("[safetensors] the hash of " + quote_text(impl_->file.path().string()) +
                           " is known only after finish()");
  }
  return impl_->file.hash();
}

std::uint64_t SafetensorsWriter::file_size() const { return impl_->file.size(); }

void save_safetensors(const std::filesystem::path& path,
                      const std::vector<std::pair<std::string, const Tensor*>>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  std::vector<TensorInfo> infos;
  infos.reserve(tensors.size());
  for (const auto& [name, tensor] : tensors) {
    const std::string where =
        "safetensors " + quote_text(path.string()) + ": tensor " + quote_text(name);
    const std::int64_t numel = checked_numel(tensor->shape, where);
    const std::uint64_t nbytes = static_cast<std::uint64_t>(numel) * dtype_size(tensor->dtype);
    if (tensor->nbytes() != nbytes) {
      throw_invalid("safetensors", quote_text(path.string()) + ": tensor " + quote_text(name) +
                                       " " + shape_string(tensor->shape) + " takes " +
                                       std::to_string(nbytes) + " bytes, but its buffer has " +
                                       std::to_string(tensor->nbytes()));
    }
    infos.push_back({name, tensor->dtype, tensor->shape});
  }
  SafetensorsWriter writer(path, std::move(infos), metadata);
  for (const auto& [name, tensor] : tensors) {
    writer.write(std::span(tensor->buffer.data, tensor->buffer.size));
  }
  writer.finish();
}

}  // namespace hqq
