// Few rows of x: every code is unpacked once, used for all of them and never stored. Included
// inside the namespace of an instruction set.

// How far ahead of the codes to fetch, in bytes: a page holds about 20 of the units that a core
// reads while memory answers, and the hardware's own prefetching stops at its end.
constexpr int kPrefetchBytes = 2048;

template <int kBits, int kUnits>
HQQ_INLINE void prefetch_block(const std::uint8_t* codes) {
  HQQ_UNROLL
  for (int line = 0; line < kBits * kUnits; ++line) {
    HQQ_PREFETCH(codes + kPrefetchBytes + line * 64);
  }
}

// The fields of a block of kUnits units, in order.
template <int kBits, int kUnits, class Take>
HQQ_INLINE void unpack_units(const std::uint8_t* codes, Take take) {
  Fields<kBits>::unpack(codes, take);
  if constexpr (kUnits == 2) {
    Fields<kBits>::unpack(codes + kBits * kFieldBytes, [&](auto field, auto v) HQQ_INLINE_LAMBDA {
      take(Index<decltype(field)::value + kUnitFields>{}, v);
    });
  }
}

template <int kRowsOfX>
struct TileSums {
  Isa::Floats sums[kRowsOfX][kParts];
};

// Calls one_part(part) for the parts of a tile: unrolled, or a loop where the code is long.
template <bool kUnroll, class OnePart>
HQQ_INLINE void for_parts(OnePart one_part) {
  if constexpr (kUnroll) {
    HQQ_UNROLL
    for (int part = 0; part < kParts; ++part) one_part(part);
  } else {
    HQQ_NO_UNROLL
    for (int part = 0; part < kParts; ++part) one_part(part);
  }
}

// Adds one block of kUnits units, all parts of the tile. `scale` and `zero` are those of its group.
template <int kBits, int kRowsOfX, int kUnits>
HQQ_INLINE void decode_fast_block(const std::uint8_t* codes, const RowOfX* x, std::int64_t col,
                                  std::int64_t block, const Isa::Floats* scale,
                                  const Isa::Floats* zero, TileSums<kRowsOfX>& y) {
  using Dot = typename Isa::template Dot<max_code<kBits>()>;
  for_parts<true>([&](int part) HQQ_INLINE_LAMBDA {
    Dot dot[kRowsOfX];
    const std::int8_t* x_codes[kRowsOfX];
    HQQ_UNROLL
    for (int m = 0; m < kRowsOfX; ++m) {
      x_codes[m] = x[m].codes + col;
      HQQ_OPAQUE(x_codes[m]);
    }
    unpack_units<kBits, kUnits>(
        codes + part * Isa::kRows * kFieldCols, [&](auto field, auto v) HQQ_INLINE_LAMBDA {
          constexpr int kField = decltype(field)::value;
          HQQ_UNROLL
          for (int m = 0; m < kRowsOfX; ++m) {
            dot[m].template add<kField>(v, Isa::broadcast4(x_codes[m] + kField * kFieldCols));
          }
        });
    HQQ_UNROLL
    for (int m = 0; m < kRowsOfX; ++m) {
      const BlockOfX& info = x[m].blocks[block];
      const Isa::Floats sum = Isa::from(dot[m].template sum<kUnits * kUnitFields>());
      const Isa::Floats centered = Isa::fnma(zero[part], Isa::broadcast(&info.sum), sum);
      y.sums[m][part] =
          Isa::fma(centered, Isa::mul(scale[part], Isa::broadcast(&info.scale)), y.sums[m][part]);
    }
  });
}

template <int kBits, int kRowsOfX, int kUnits>
HQQ_INLINE void decode_exact_block(const std::uint8_t* codes, const RowOfX* x, std::int64_t col,
                                   std::int64_t block, const Isa::Floats* scale,
                                   const Isa::Floats* zero, TileSums<kRowsOfX>& y) {
  for_parts<kRowsOfX == 1>([&](int part) HQQ_INLINE_LAMBDA {
    // One sum a byte position: independent chains hide the latency of the multiply-add. Several
    // rows are as many chains.
    constexpr int kChains = kRowsOfX == 1 ? kFieldCols : 2;
    Isa::Floats sums[kRowsOfX][kChains];
    const float* values[kRowsOfX];
    HQQ_UNROLL
    for (int m = 0; m < kRowsOfX; ++m) {
      values[m] = x[m].values + col;
      HQQ_OPAQUE(values[m]);
    }
    unpack_units<kBits, kUnits>(
        codes + part * Isa::kRows * kFieldCols, [&](auto field, auto v) HQQ_INLINE_LAMBDA {
          constexpr int kField = decltype(field)::value;
          unrolled<kFieldCols>([&](auto byte) HQQ_INLINE_LAMBDA {
            constexpr int kByte = decltype(byte)::value;
            constexpr int kChain = kByte % kChains;
            const Isa::Floats code = Isa::template byte_shifted<kByte>(v);
            HQQ_UNROLL
            for (int m = 0; m < kRowsOfX; ++m) {
              const Isa::Floats value = Isa::broadcast(values[m] + kField * kFieldCols + kByte);
              sums[m][kChain] = kField == 0 && kByte < kChains
                                    ? Isa::mul(code, value)
                                    : Isa::fma(code, value, sums[m][kChain]);
            }
          });
        });
    HQQ_UNROLL
    for (int m = 0; m < kRowsOfX; ++m) {
      Isa::Floats sum = Isa::add(sums[m][0], sums[m][1]);
      if constexpr (kChains == 4) sum = Isa::add(sum, Isa::add(sums[m][2], sums[m][3]));
      const Isa::Floats centered =
          Isa::fnma(zero[part], Isa::broadcast(&x[m].blocks[block].sum), sum);
      y.sums[m][part] = Isa::fma(centered, scale[part], y.sums[m][part]);
    }
  });
}

template <bool kFast, int kBits, int kRowsOfX, class Meta>
void decode_tile(const TileArgs& args) {
  constexpr int kTiles = decode_tiles(kFast, kBits, kRowsOfX);
  // What is stored differs from the code where Dot shifts codes to fit signed bytes.
  constexpr int kOffset = kFast ? Isa::template Dot<max_code<kBits>()>::kOffset : 0;
  const ColumnPlan& plan = *args.plan;
  RowOfX x[kRowsOfX];
  TileSums<kRowsOfX> y[kTiles];
  for (int m = 0; m < kRowsOfX; ++m) {
    x[m] = args.x[m];
    for (int t = 0; t < kTiles; ++t) {
      HQQ_UNROLL
      for (int part = 0; part < kParts; ++part) y[t].sums[m][part] = Isa::zero();
    }
  }
  std::int64_t bytes = 0;  // of codes that are done
  std::int64_t block = 0;
  for (std::int64_t g = 0; g < plan.num_groups; ++g) {
    const std::int64_t end = g + 1 < plan.num_groups ? block + plan.group_blocks : plan.num_blocks;
    for (; block < end; ++block) {
      const std::int64_t col = plan.blocks[block].first_col;
      const auto add = [&](auto units) HQQ_INLINE_LAMBDA {
        constexpr int kUnits = decltype(units)::value;
        HQQ_NO_UNROLL
        for (int t = 0; t < kTiles; ++t) {
          const std::uint8_t* codes = args.codes[t] + bytes;
          const Meta* scales = static_cast<const Meta*>(args.scale[t]) + g * kTileRows;
          const Meta* zeros = static_cast<const Meta*>(args.zero[t]) + g * kTileRows;
          Isa::Floats scale[kParts], zero[kParts];
          HQQ_UNROLL
          for (int part = 0; part < kParts; ++part) {
            scale[part] = Isa::load(scales + part * Isa::kRows);
            zero[part] = Isa::load(zeros + part * Isa::kRows);
            if constexpr (kOffset != 0) zero[part] = Isa::sub(zero[part], Isa::set(kOffset));
          }
          prefetch_block<kBits, kUnits>(codes);
          if constexpr (kFast) {
            decode_fast_block<kBits, kRowsOfX, kUnits>(codes, x, col, block, scale, zero, y[t]);
          } else {
            decode_exact_block<kBits, kRowsOfX, kUnits>(codes, x, col, block, scale, zero, y[t]);
          }
        }
        bytes += kUnits * kBits * kFieldBytes;
      };
      if (plan.blocks[block].cols > kUnitCols) {
        add(Index<2>{});
      } else {
        add(Index<1>{});
      }
    }
  }
  for (int t = 0; t < kTiles; ++t) {
    for (int m = 0; m < kRowsOfX; ++m) {
      HQQ_UNROLL
      for (int part = 0; part < kParts; ++part) {
        Isa::store(args.y + (t * kRowsOfX + m) * kTileRows + part * Isa::kRows, y[t].sums[m][part]);
      }
    }
  }
}
