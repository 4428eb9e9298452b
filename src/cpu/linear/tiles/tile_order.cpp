#include "src/cpu/linear/tiles/tile_order.hpp"

#include <algorithm>
#include <cstring>
#include <span>
#include <vector>

#include "hqq/bitpack.hpp"
#include "hqq/core/codec.hpp"

namespace hqq::cpu {
namespace {

// A unit's codes, [field][4 * row + column].
using UnitFields = std::uint8_t[kUnitFields][kFieldBytes];

void pack_unit(const FieldPacking& how, const UnitFields& fields, std::uint8_t* out) {
  std::fill_n(out, how.bits * kFieldBytes, std::uint8_t{0});
  const auto put = [&](const std::uint8_t* field, std::uint8_t* vector, int to, int from,
                       int mask) {
    for (int i = 0; i < kFieldBytes; ++i) {
      vector[i] = static_cast<std::uint8_t>(vector[i] | ((field[i] >> to & mask) << from));
    }
  };
  for (int v = 0; v < how.bits; ++v) {
    for (int s = 0; s < how.slots; ++s) {
      put(fields[v * how.slots + s], out + v * kFieldBytes, 0, s * how.bits, 255);
    }
  }
  for (const Piece& p : std::span(how.pieces, static_cast<std::size_t>(how.num_pieces))) {
    put(fields[p.field], out + p.vector * kFieldBytes, p.to, p.from, (1 << p.count) - 1);
  }
}

void unpack_unit(const FieldPacking& how, const std::uint8_t* in, UnitFields& fields) {
  std::memset(fields, 0, sizeof(UnitFields));
  const auto take = [&](std::uint8_t* field, const std::uint8_t* vector, int to, int from,
                        int mask) {
    for (int i = 0; i < kFieldBytes; ++i) {
      field[i] = static_cast<std::uint8_t>(field[i] | ((vector[i] >> from & mask) << to));
    }
  };
  for (int v = 0; v < how.bits; ++v) {
    for (int s = 0; s < how.slots; ++s) {
      take(fields[v * how.slots + s], in + v * kFieldBytes, 0, s * how.bits, (1 << how.bits) - 1);
    }
  }
  for (const Piece& p : std::span(how.pieces, static_cast<std::size_t>(how.num_pieces))) {
    take(fields[p.field], in + p.vector * kFieldBytes, p.to, p.from, (1 << p.count) - 1);
  }
}

// Codes of the rows of a tile, [16][columns padded to units], per thread.
std::uint8_t* tile_codes(const TileOrder& order) {
  thread_local std::vector<std::uint8_t> codes;
  codes.resize(static_cast<std::size_t>(kTileRows * order.units() * kUnitCols));
  return codes.data();
}

}  // namespace

TileOrder::TileOrder(const LayerConfig& config, const core::GroupLayout& layout)
    : axis_(config.axis),
      bits_(stored_bits(config.nbits)),
      units_((layout.cols + kUnitCols - 1) / kUnitCols) {
  if (axis_ == 1) {
    tiles_ = (layout.rows + kTileRows - 1) / kTileRows;
    groups_ = layout.groups_per_row();
  } else {
    tiles_ = layout.rows / kTileRows;
    scale_rows_ = layout.metadata_rows();
    tiles_per_scale_row_ = layout.group_size / kTileRows;
  }
}

std::pair<std::int64_t, int> TileOrder::position(std::int64_t row) const {
  if (axis_ == 1) return {row / kTileRows, static_cast<int>(row % kTileRows)};
  const std::int64_t member = row / scale_rows_;
  return {row % scale_rows_ * tiles_per_scale_row_ + member / kTileRows,
          static_cast<int>(member % kTileRows)};
}

void pack_tile(const QuantizedTensor& q, const TileOrder& order, std::int64_t tile,
               std::uint8_t* out) {
  const core::RowFormat format = core::row_format(q.config.nbits);
  const std::int64_t row_bytes = packed_row_bytes(q.config.nbits, q.in_features);
  const std::int64_t padded = order.units() * kUnitCols;
  std::uint8_t* codes = tile_codes(order);
  for (int lane = 0; lane < kTileRows; ++lane) {
    std::uint8_t* lane_codes = codes + lane * padded;
    const std::int64_t row = order.row(tile, lane);
    std::int64_t filled = 0;
    if (row < q.out_features) {
      core::unpack_row(format, q.W_q.data<std::uint8_t>() + row * row_bytes, q.in_features,
                       lane_codes);
      filled = q.in_features;
    }
    std::fill(lane_codes + filled, lane_codes + padded, std::uint8_t{0});
  }
  const FieldPacking& how = field_packing(order.bits());
  for (std::int64_t unit = 0; unit < order.units(); ++unit) {
    UnitFields fields;
    for (int lane = 0; lane < kTileRows; ++lane) {
      for (int f = 0; f < kUnitFields; ++f) {
        std::memcpy(fields[f] + lane * kFieldCols,
                    codes + lane * padded + unit * kUnitCols + f * kFieldCols, kFieldCols);
      }
    }
    pack_unit(how, fields, out + unit * how.bits * kFieldBytes);
  }
}

void unpack_codes(const std::uint8_t* in, const TileOrder& order, std::uint8_t* out) {
  const std::int64_t padded = order.units() * kUnitCols;
  const FieldPacking& how = field_packing(order.bits());
  for (std::int64_t unit = 0; unit < order.units(); ++unit) {
    UnitFields fields;
    unpack_unit(how, in + unit * how.bits * kFieldBytes, fields);
    for (int lane = 0; lane < kTileRows; ++lane) {
      for (int f = 0; f < kUnitFields; ++f) {
        std::memcpy(out + lane * padded + unit * kUnitCols + f * kFieldCols,
                    fields[f] + lane * kFieldCols, kFieldCols);
      }
    }
  }
}

void unpack_tile(const std::uint8_t* in, const TileOrder& order, std::int64_t tile,
                 QuantizedTensor& q) {
  const core::RowFormat format = core::row_format(q.config.nbits);
  const std::int64_t row_bytes = packed_row_bytes(q.config.nbits, q.in_features);
  std::uint8_t* codes = tile_codes(order);
  unpack_codes(in, order, codes);
  for (int lane = 0; lane < kTileRows; ++lane) {
    const std::int64_t row = order.row(tile, lane);
    if (row >= q.out_features) break;
    core::pack_row(format, codes + lane * order.units() * kUnitCols, q.in_features,
                   q.W_q.data<std::uint8_t>() + row * row_bytes);
  }
}

void pack_metadata(const Tensor& rows, const TileOrder& order, std::int64_t tile, std::byte* out) {
  const std::size_t size = dtype_size(rows.dtype);
  const std::int64_t groups = order.groups();
  for (int lane = 0; lane < kTileRows; ++lane) {
    const std::int64_t row = order.row(tile, lane);
    for (std::int64_t g = 0; g < groups; ++g) {
      std::byte* to = out + static_cast<std::size_t>(g * kTileRows + lane) * size;
      if (row < rows.shape[0]) {
        std::memcpy(to, rows.buffer.data + static_cast<std::size_t>(row * groups + g) * size, size);
      } else {
        std::memset(to, 0, size);
      }
    }
  }
}

void unpack_metadata(const std::byte* in, const TileOrder& order, std::int64_t tile, Tensor& rows) {
  const std::size_t size = dtype_size(rows.dtype);
  const std::int64_t groups = order.groups();
  for (int lane = 0; lane < kTileRows; ++lane) {
    const std::int64_t row = order.row(tile, lane);
    if (row >= rows.shape[0]) break;
    for (std::int64_t g = 0; g < groups; ++g) {
      std::memcpy(rows.buffer.data + static_cast<std::size_t>(row * groups + g) * size,
                  in + static_cast<std::size_t>(g * kTileRows + lane) * size, size);
    }
  }
}

}  // namespace hqq::cpu
