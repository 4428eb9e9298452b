// Many rows of x, or groups that begin inside a unit: the codes of a panel (a part of a tile) are
// unpacked into scratch, and all rows of x pass over it, a few at a time in registers. Included
// inside the namespace of an instruction set.

// Rows of x, and parts of the tile, whose sums are in registers at a time. Three rows and two parts
// need five loads for six products; with sixteen registers, more would not fit.
constexpr int kFastRows = kParts == 1 ? 8 : 3;
constexpr int kPanelParts = kParts == 1 ? 1 : 2;
constexpr int kExactRows = Isa::kRows == kTileRows ? 12 : 6;

// Fields of the panel as bytes, [fields][64].
template <int kBits>
void unpack_panel(const std::uint8_t* codes, std::int64_t first_unit, std::int64_t end_unit,
                  std::uint8_t* out) {
  codes += first_unit * kBits * kFieldBytes;
  for (std::int64_t unit = first_unit; unit < end_unit; ++unit) {
    HQQ_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int offset = part * Isa::kRows * kFieldCols;
      Fields<kBits>::unpack(codes + offset, [&](auto field, auto v) HQQ_INLINE_LAMBDA {
        Isa::store(out + decltype(field)::value * kFieldBytes + offset, v);
      });
    }
    codes += kBits * kFieldBytes;
    out += kUnitFields * kFieldBytes;
  }
}

template <int kRowsOfX, class Step>
HQQ_INLINE void for_each(Step step) {
  HQQ_UNROLL
  for (int m = 0; m < kRowsOfX; ++m) {
    HQQ_UNROLL
    for (int p = 0; p < kPanelParts; ++p) step(m, p);
  }
}

// kPanelParts parts of a tile, from part first_part on, times kRowsOfX rows of x, over the blocks
// of the panel. `fields` are those of column first_col on.
template <int kMaxCode, int kRowsOfX>
void panel_fast_rows(const PanelArgs& args, const std::uint8_t* fields, std::int64_t first_col,
                     int first_part, std::int64_t first_row) {
  using Dot = typename Isa::template Dot<kMaxCode>;
  const RowOfX* x = args.x + first_row;
  const int first_lane = first_part * Isa::kRows;
  float* y = args.y + first_row * kTileRows + first_lane;
  Isa::Floats sums[kRowsOfX][kPanelParts];
  for_each<kRowsOfX>([&](int m, int p) HQQ_INLINE_LAMBDA {
    sums[m][p] = Isa::load(y + m * kTileRows + p * Isa::kRows);
  });
  for (std::int64_t b = args.first_block; b < args.end_block; ++b) {
    const Block& block = args.plan->blocks[b];
    const std::uint8_t* codes =
        fields + (block.first_col - first_col) / kFieldCols * kFieldBytes + first_lane * kFieldCols;
    const auto dot_fields = [&](auto count, std::int64_t first_field,
                                Isa::Ints(&totals)[kRowsOfX][kPanelParts]) HQQ_INLINE_LAMBDA {
      constexpr int kFields = decltype(count)::value;
      const std::uint8_t* from = codes + first_field * kFieldBytes;
      const std::int64_t col = block.first_col + first_field * kFieldCols;
      Dot dot[kRowsOfX][kPanelParts];
      unrolled<kFields>([&](auto field) HQQ_INLINE_LAMBDA {
        constexpr int kField = decltype(field)::value;
        Isa::Bytes v[kPanelParts];
        HQQ_UNROLL
        for (int p = 0; p < kPanelParts; ++p) {
          v[p] = Isa::load(from + kField * kFieldBytes + p * Isa::kRows * kFieldCols);
        }
        HQQ_UNROLL
        for (int m = 0; m < kRowsOfX; ++m) {
          const Isa::Bytes four = Isa::broadcast4(x[m].codes + col + kField * kFieldCols);
          HQQ_UNROLL
          for (int p = 0; p < kPanelParts; ++p) dot[m][p].template add<kField>(v[p], four);
        }
      });
      for_each<kRowsOfX>([&](int m, int p) HQQ_INLINE_LAMBDA {
        totals[m][p] = dot[m][p].template sum<kFields>();
      });
    };
    Isa::Ints totals[kRowsOfX][kPanelParts];
    // Other blocks have an even number of fields, or end the row, where x is padded with zeros.
    if (block.cols == kMaxBlockCols) {
      dot_fields(Index<2 * kUnitFields>{}, 0, totals);
    } else if (block.cols == kUnitCols) {
      dot_fields(Index<kUnitFields>{}, 0, totals);
    } else {
      dot_fields(Index<2>{}, 0, totals);
      for (int field = 2; field * kFieldCols < block.cols; field += 2) {
        Isa::Ints more[kRowsOfX][kPanelParts];
        dot_fields(Index<2>{}, field, more);
        for_each<kRowsOfX>([&](int m, int p) HQQ_INLINE_LAMBDA {
          totals[m][p] = Isa::add_ints(totals[m][p], more[m][p]);
        });
      }
    }
    const std::int64_t group = block.group * kTileRows + first_lane;
    for_each<kRowsOfX>([&](int m, int p) HQQ_INLINE_LAMBDA {
      const BlockOfX& info = x[m].blocks[b];
      const Isa::Floats scale = Isa::load(args.scale + group + p * Isa::kRows);
      const Isa::Floats zero =
          Isa::sub(Isa::load(args.zero + group + p * Isa::kRows), Isa::set(Dot::kOffset));
      const Isa::Floats centered =
          Isa::fnma(zero, Isa::broadcast(&info.sum), Isa::from(totals[m][p]));
      sums[m][p] = Isa::fma(centered, Isa::mul(scale, Isa::broadcast(&info.scale)), sums[m][p]);
    });
  }
  for_each<kRowsOfX>([&](int m, int p) HQQ_INLINE_LAMBDA {
    Isa::store(y + m * kTileRows + p * Isa::kRows, sums[m][p]);
  });
}

// Calls rows(Index<n>, first row) for all rows of x, kMost at a time.
template <int kMost, class Rows>
HQQ_INLINE void for_rows(std::int64_t count, Rows rows) {
  std::int64_t m = 0;
  for (; m + kMost <= count; m += kMost) rows(Index<kMost>{}, m);
  if constexpr (kMost > 8) {
    for (; m + 8 <= count; m += 8) rows(Index<8>{}, m);
  }
  if constexpr (kMost > 4) {
    for (; m + 4 <= count; m += 4) rows(Index<4>{}, m);
  }
  for (; m + 2 <= count; m += 2) rows(Index<2>{}, m);
  if (m < count) rows(Index<1>{}, m);
}

// The columns that the blocks of a panel need, in whole units.
struct PanelUnits {
  explicit PanelUnits(const PanelArgs& args) {
    const Block& last = args.plan->blocks[args.end_block - 1];
    first = args.plan->blocks[args.first_block].first_col / kUnitCols;
    end = (last.first_col + last.cols + kUnitCols - 1) / kUnitCols;
  }
  std::int64_t first, end;
};

template <int kBits>
void panel_fast(const PanelArgs& args) {
  const PanelUnits units(args);
  auto* fields = static_cast<std::uint8_t*>(args.scratch);
  unpack_panel<kBits>(args.codes, units.first, units.end, fields);
  for_rows<kFastRows>(args.rows, [&](auto rows, std::int64_t m) HQQ_INLINE_LAMBDA {
    HQQ_UNROLL
    for (int part = 0; part < kParts; part += kPanelParts) {
      panel_fast_rows<Isa::dot_class(max_code<kBits>()), decltype(rows)::value>(
          args, fields, units.first * kUnitCols, part, m);
    }
  });
}

// W_r of the blocks of the panel, [columns][16].
template <int kBits>
void dequantize_panel(const PanelArgs& args, const PanelUnits& units, float* out) {
  std::uint8_t fields[(kPanelUnitsExact + 2) * kUnitFields * kFieldBytes];
  unpack_panel<kBits>(args.codes, units.first, units.end, fields);
  for (std::int64_t b = args.first_block; b < args.end_block; ++b) {
    const Block& block = args.plan->blocks[b];
    HQQ_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const std::int64_t group = block.group * kTileRows + part * Isa::kRows;
      const Isa::Floats scale = Isa::load(args.scale + group);
      const Isa::Floats zero = Isa::load(args.zero + group);
      for (int c = 0; c < block.cols; c += kFieldCols) {
        const std::int64_t col = block.first_col - units.first * kUnitCols + c;
        const Isa::Bytes v =
            Isa::load(fields + col / kFieldCols * kFieldBytes + part * Isa::kRows * kFieldCols);
        unrolled<kFieldCols>([&](auto byte) HQQ_INLINE_LAMBDA {
          constexpr int kByte = decltype(byte)::value;
          Isa::store(out + (col + kByte) * kTileRows + part * Isa::kRows,
                     Isa::mul(Isa::sub(Isa::template byte<kByte>(v), zero), scale));
        });
      }
    }
  }
}

template <int kRowsOfX>
void panel_exact_rows(const PanelArgs& args, const float* weights, std::int64_t first_col,
                      std::int64_t end_col, std::int64_t first_row) {
  const float* values[kRowsOfX];
  float* y = args.y + first_row * kTileRows;
  Isa::Floats sums[kRowsOfX][kParts];
  HQQ_UNROLL
  for (int m = 0; m < kRowsOfX; ++m) {
    values[m] = args.x[first_row + m].values;
    HQQ_UNROLL
    for (int part = 0; part < kParts; ++part) {
      sums[m][part] = Isa::load(y + m * kTileRows + part * Isa::kRows);
    }
  }
  for (std::int64_t col = first_col; col < end_col; ++col) {
    Isa::Floats w[kParts];
    HQQ_UNROLL
    for (int part = 0; part < kParts; ++part) w[part] = Isa::load(weights + part * Isa::kRows);
    weights += kTileRows;
    HQQ_UNROLL
    for (int m = 0; m < kRowsOfX; ++m) {
      const Isa::Floats value = Isa::broadcast(values[m] + col);
      HQQ_UNROLL
      for (int part = 0; part < kParts; ++part) {
        sums[m][part] = Isa::fma(w[part], value, sums[m][part]);
      }
    }
  }
  HQQ_UNROLL
  for (int m = 0; m < kRowsOfX; ++m) {
    HQQ_UNROLL
    for (int part = 0; part < kParts; ++part) {
      Isa::store(y + m * kTileRows + part * Isa::kRows, sums[m][part]);
    }
  }
}

template <int kBits>
void panel_exact(const PanelArgs& args) {
  const PanelUnits units(args);
  auto* weights = static_cast<float*>(args.scratch);
  dequantize_panel<kBits>(args, units, weights);
  const Block& last = args.plan->blocks[args.end_block - 1];
  const std::int64_t first_col = args.plan->blocks[args.first_block].first_col;
  weights += (first_col - units.first * kUnitCols) * kTileRows;
  for_rows<kExactRows>(args.rows, [&](auto rows, std::int64_t m) HQQ_INLINE_LAMBDA {
    panel_exact_rows<decltype(rows)::value>(args, weights, first_col, last.first_col + last.cols,
                                            m);
  });
}
