#include "src/format/metadata.hpp"

#include <algorithm>

#include "hqq/core/metadata.hpp"
#include "src/format/float_values.hpp"

namespace hqq {
namespace {

constexpr std::size_t kBlock = core::kMetadataBlock;

// 8-bit codes of one block: value = code * step + offset.
void store_block(std::span<const float> values, std::uint8_t* codes, float& step, float& offset,
                 float* read_back) {
  const core::MetadataStep block =
      core::metadata_step([&](std::int64_t i) { return values[static_cast<std::size_t>(i)]; },
                          static_cast<std::int64_t>(values.size()));
  for (std::size_t i = 0; i < values.size(); ++i) {
    codes[i] = core::metadata_code(values[i], block);
    read_back[i] = core::metadata_value(codes[i], block);
  }
  step = block.step;
  offset = block.offset;
}

}  // namespace

void store_metadata(std::span<const float> values, std::size_t begin, Tensor& codes, Tensor& step,
                    Tensor& offset, float* read_back) {
  if (codes.dtype != DType::kU8) {
    std::byte* out = codes.buffer.data + begin * dtype_size(codes.dtype);
    write_values(values, codes.dtype, out);
    read_values(codes.dtype, out, std::span(read_back, values.size()));
    return;
  }
  for (std::size_t i = 0; i < values.size(); i += kBlock) {
    const std::size_t count = std::min(kBlock, values.size() - i);
    const std::size_t block = (begin + i) / kBlock;
    store_block(values.subspan(i, count), codes.data<std::uint8_t>() + begin + i,
                step.data<float>()[block], offset.data<float>()[block], read_back + i);
  }
}

void read_metadata(const Tensor& codes, const Tensor& step, const Tensor& offset, std::size_t begin,
                   std::span<float> out) {
  const std::byte* values = codes.buffer.data + begin * dtype_size(codes.dtype);
  if (codes.dtype != DType::kU8) return read_values(codes.dtype, values, out);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::size_t block = (begin + i) / kBlock;
    out[i] = static_cast<float>(std::to_integer<int>(values[i])) * step.data<float>()[block] +
             offset.data<float>()[block];
  }
}

std::vector<float> read_metadata(const Tensor& codes, const Tensor& step, const Tensor& offset) {
  std::vector<float> values(static_cast<std::size_t>(codes.numel()));
  read_metadata(codes, step, offset, 0, values);
  return values;
}

std::vector<float> read_scale(const QuantizedTensor& q) {
  return read_metadata(q.scale, q.scale_step, q.scale_offset);
}
std::vector<float> read_zero(const QuantizedTensor& q) {
  return read_metadata(q.zero, q.zero_step, q.zero_offset);
}

}  // namespace hqq
