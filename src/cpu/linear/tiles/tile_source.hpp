// The weights of a product, tile by tile, whichever order they are stored in.
#pragma once

#include "src/backend.hpp"
#include "src/cpu/linear/kernels.hpp"
#include "src/cpu/linear/scratch.hpp"
#include "src/cpu/linear/tiles/tile_order.hpp"

namespace hqq::cpu {

// One tile in memory: codes [units][bits][64], scale and zero [groups][16] of type `meta` (axis 1).
struct TileOperand {
  const std::uint8_t* codes;
  const void* scale;
  const void* zero;
  MetaType meta;
};

class TileSource {
 public:
  // What a thread needs for values that must be converted.
  struct State {
    Scratch<std::uint8_t> codes;
    Scratch<std::byte> metadata;
    Scratch<float> scale, zero;
  };

  // The weight must outlive the source.
  explicit TileSource(const LinearTask& task);

  const core::GroupLayout& layout() const { return layout_; }
  const TileOrder& order() const { return order_; }
  // [in_features], or empty.
  std::vector<float> col_scale() const;

  // `f16`: the caller takes float16 metadata as it is stored; else it gets float32.
  TileOperand tile(std::int64_t index, bool f16, State& state) const;

  // Axis 0: scales and zeros of row `index` of the metadata, [in_features], codes null. `f16` as
  // above; float32 is a copy in `state`, with room for whole units.
  TileOperand metadata_row(std::int64_t index, bool f16, State& state) const;

 private:
  struct Metadata {
    const Tensor *values, *step, *offset;
  };
  bool is_f16() const;
  const void* tile_metadata(const Metadata& metadata, std::int64_t index, bool f16, float* out,
                            State& state) const;
  void read_u8_tile(const Metadata& metadata, std::int64_t index, const std::uint8_t* codes,
                    float* out) const;
  const void* read_row(const Metadata& metadata, std::int64_t index, bool f16, float* out) const;

  const QuantizedTensor* q_;  // one of the two
  const TiledTensor* tiled_;
  core::GroupLayout layout_;
  TileOrder order_;
  Metadata scale_, zero_;
  const Tensor* col_scale_;
};

}  // namespace hqq::cpu
