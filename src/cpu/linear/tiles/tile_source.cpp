#include "src/cpu/linear/tiles/tile_source.hpp"

#include <algorithm>

#include "hqq/core/metadata.hpp"
#include "src/cpu/linear/choose.hpp"
#include "src/format/float_values.hpp"
#include "src/format/metadata.hpp"

namespace hqq::cpu {
namespace {

void read_floats(DType dtype, const std::byte* in, std::int64_t count, float* out) {
  if (dtype == DType::kF16) {
    linear_kernels().read_f16(reinterpret_cast<const std::uint16_t*>(in), count, out);
  } else {
    read_values(dtype, in, std::span(out, static_cast<std::size_t>(count)));
  }
}

}  // namespace

TileSource::TileSource(const LinearTask& task)
    : q_(task.q),
      tiled_(task.tiled),
      layout_(q_ != nullptr ? q_->layout() : tiled_->layout()),
      order_(q_ != nullptr ? q_->config : tiled_->config, layout_) {
  const auto set = [&](const auto& weight) {
    scale_ = {&weight.scale, &weight.scale_step, &weight.scale_offset};
    zero_ = {&weight.zero, &weight.zero_step, &weight.zero_offset};
    col_scale_ = &weight.col_scale;
  };
  if (q_ != nullptr) {
    set(*q_);
  } else {
    set(*tiled_);
  }
}

std::vector<float> TileSource::col_scale() const {
  if (!*col_scale_) return {};
  std::vector<float> values(static_cast<std::size_t>(layout_.cols));
  read_floats(col_scale_->dtype, col_scale_->buffer.data, layout_.cols, values.data());
  return values;
}

TileOperand TileSource::tile(std::int64_t index, bool f16, State& state) const {
  TileOperand operand{};
  if (tiled_ != nullptr) {
    operand.codes = tiled_->W_q.data<std::uint8_t>() + index * order_.tile_bytes();
  } else {
    std::uint8_t* codes = state.codes.get(order_.tile_bytes());
    pack_tile(*q_, order_, index, codes);
    operand.codes = codes;
  }
  if (layout_.axis == 0) return operand;
  // Both or none: kernels take one type.
  f16 = f16 && tiled_ != nullptr && is_f16();
  operand.meta = f16 ? MetaType::kF16 : MetaType::kF32;
  const std::int64_t count = order_.groups() * kTileRows;
  operand.scale = tile_metadata(scale_, index, f16, state.scale.get(count), state);
  operand.zero = tile_metadata(zero_, index, f16, state.zero.get(count), state);
  return operand;
}

const void* TileSource::tile_metadata(const Metadata& metadata, std::int64_t index, bool f16,
                                      float* out, State& state) const {
  const DType dtype = metadata.values->dtype;
  const std::int64_t groups = order_.groups();
  const std::int64_t count = groups * kTileRows;
  const std::byte* values;
  if (tiled_ != nullptr) {
    values =
        metadata.values->buffer.data + static_cast<std::size_t>(index * count) * dtype_size(dtype);
    if (f16 || dtype == DType::kF32) return values;
  } else {
    std::byte* packed = state.metadata.get(count * static_cast<std::int64_t>(dtype_size(dtype)));
    pack_metadata(*metadata.values, order_, index, packed);
    values = packed;
  }
  if (dtype != DType::kU8) {
    read_floats(dtype, values, count, out);
    return out;
  }
  read_u8_tile(metadata, index, reinterpret_cast<const std::uint8_t*>(values), out);
  return out;
}

bool TileSource::is_f16() const {
  return scale_.values->dtype == DType::kF16 && zero_.values->dtype == DType::kF16;
}

// Steps and offsets belong to runs of groups in row-major order: each row of the tile changes to
// the next at groups of its own.
void TileSource::read_u8_tile(const Metadata& metadata, std::int64_t index,
                              const std::uint8_t* codes, float* out) const {
  const std::int64_t groups = order_.groups();
  for (std::int64_t g = 0; g < groups;) {
    float step[kTileRows] = {}, offset[kTileRows] = {};
    std::int64_t end = groups;
    for (int lane = 0; lane < kTileRows; ++lane) {
      const std::int64_t row = order_.row(index, lane);
      if (row >= layout_.rows) break;
      const std::int64_t block = (row * groups + g) / core::kMetadataBlock;
      step[lane] = metadata.step->data<float>()[block];
      offset[lane] = metadata.offset->data<float>()[block];
      end = std::min(end, (block + 1) * core::kMetadataBlock - row * groups);
    }
    linear_kernels().read_u8(codes + g * kTileRows, end - g, step, offset, out + g * kTileRows);
    g = end;
  }
}

TileOperand TileSource::metadata_row(std::int64_t index, bool f16, State& state) const {
  const std::int64_t padded = order_.units() * kUnitCols;
  f16 = f16 && is_f16();
  return {nullptr, read_row(scale_, index, f16, state.scale.get(padded)),
          read_row(zero_, index, f16, state.zero.get(padded)),
          f16 ? MetaType::kF16 : MetaType::kF32};
}

const void* TileSource::read_row(const Metadata& metadata, std::int64_t index, bool f16,
                                 float* out) const {
  const Tensor& values = *metadata.values;
  const auto first = static_cast<std::size_t>(index * layout_.cols);
  if (values.dtype == DType::kF16) {
    const auto* row = values.data<std::uint16_t>() + first;
    if (f16) return row;
    linear_kernels().read_f16(row, layout_.cols, out);
  } else {
    read_metadata(values, *metadata.step, *metadata.offset, first,
                  std::span(out, static_cast<std::size_t>(layout_.cols)));
  }
  return out;
}

}  // namespace hqq::cpu
