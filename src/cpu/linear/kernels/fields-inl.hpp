// Packed vectors of a unit -> its eight fields (tiles.hpp). Included inside the namespace of an
// instruction set, after its struct Isa.

// Registers that the rows of a tile take.
constexpr int kParts = kTileRows / Isa::kRows;

template <int kIndex>
struct Index {
  static constexpr int value = kIndex;
};

// Calls step(Index<f>) for f = 0 .. kCount - 1.
template <int kCount, int kFrom = 0, class Step>
HQQ_INLINE void unrolled(Step step) {
  if constexpr (kFrom < kCount) {
    step(Index<kFrom>{});
    unrolled<kCount, kFrom + 1>(step);
  }
}

template <int kBits>
constexpr int max_code() {
  return (1 << kBits) - 1;
}

HQQ_INLINE Isa::Bytes vector_of(const std::uint8_t* unit, int v) {
  return Isa::load(unit + v * kFieldBytes);
}

// (v >> kShift) & kMask for every byte. A shift moves bits across bytes, so a mask follows every
// shift.
template <int kShift, int kMask, class V>
HQQ_INLINE V bits_of(V v) {
  if constexpr (kShift > 0) {
    return Isa::and_mask<kMask>(Isa::template shift_right<kShift>(v));
  } else if constexpr (kMask < 255) {
    return Isa::and_mask<kMask>(v);
  } else {
    return v;
  }
}

// Reads the fields of a unit as kFieldPackings says.
template <int kBits>
struct Fields {
  static_assert(field_packing_index(kBits) >= 0, "kFieldPackings has no row for this width");
  static constexpr FieldPacking kPacking = field_packing(kBits);
  static constexpr int kWhole = kBits * kPacking.slots;  // fields without pieces
  static_assert(kPacking.num_pieces > 0 || kWhole == kUnitFields);

  // Calls take(Index<f>, codes) for the fields f = 0..7, in this order. `unit` points to the part
  // of the first vector that Isa::kRows rows take; vectors are kFieldBytes apart.
  template <class Take>
  HQQ_INLINE static void unpack(const std::uint8_t* unit, Take take) {
    Isa::Bytes v[kBits];
    if constexpr (kPacking.num_pieces > 0) {
      unrolled<kBits>([&](auto index) HQQ_INLINE_LAMBDA {
        v[decltype(index)::value] = vector_of(unit, decltype(index)::value);
      });
    }
    unrolled<kWhole>([&](auto index) HQQ_INLINE_LAMBDA {
      constexpr int kField = decltype(index)::value;
      constexpr int kVector = kField / kPacking.slots, kSlot = kField % kPacking.slots;
      if constexpr (kPacking.num_pieces == 0 && kSlot == 0) v[kVector] = vector_of(unit, kVector);
      take(index, bits_of<kSlot * kBits, (1 << kBits) - 1>(v[kVector]));
    });
    unrolled<kUnitFields, kWhole>([&](auto index) HQQ_INLINE_LAMBDA {
      take(index, assembled<decltype(index)::value, first_piece(decltype(index)::value)>(v));
    });
  }

 private:
  static constexpr int first_piece(int field) {
    int piece = 0;
    while (kPacking.pieces[piece].field != field) ++piece;
    return piece;
  }

  // The pieces of a field, which follow each other from number kPiece on.
  template <int kField, int kPiece>
  HQQ_INLINE static Isa::Bytes assembled(const Isa::Bytes* v) {
    constexpr Piece kHere = kPacking.pieces[kPiece];
    static_assert(kHere.from >= kHere.to, "a piece must be above the bits that it becomes");
    const auto bits =
        bits_of<kHere.from - kHere.to, ((1 << kHere.count) - 1) << kHere.to>(v[kHere.vector]);
    if constexpr (kPiece + 1 < kPacking.num_pieces && kPacking.pieces[kPiece + 1].field == kField) {
      return Isa::or_(bits, assembled<kField, kPiece + 1>(v));
    } else {
      return bits;
    }
  }
};
