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

// Calls take(Index<f>, codes) for the fields f = 0..7 of a unit, in this order. `unit` points to
// the part of the first vector that Isa::kRows rows take; vectors are kFieldBytes apart. A shift
// moves bits across bytes, so a mask follows every shift.
template <int kBits>
struct Fields;

HQQ_INLINE Isa::Bytes vector_of(const std::uint8_t* unit, int v) {
  return Isa::load(unit + v * kFieldBytes);
}

// (v >> kShift) & kMask
template <int kShift, int kMask, class V>
HQQ_INLINE V bits_of(V v) {
  if constexpr (kShift > 0) {
    return Isa::and_mask<kMask>(Isa::template shift_right<kShift>(v));
  } else {
    return Isa::and_mask<kMask>(v);
  }
}

template <>
struct Fields<8> {
  template <class Take>
  HQQ_INLINE static void unpack(const std::uint8_t* unit, Take take) {
    take(Index<0>{}, vector_of(unit, 0));
    take(Index<1>{}, vector_of(unit, 1));
    take(Index<2>{}, vector_of(unit, 2));
    take(Index<3>{}, vector_of(unit, 3));
    take(Index<4>{}, vector_of(unit, 4));
    take(Index<5>{}, vector_of(unit, 5));
    take(Index<6>{}, vector_of(unit, 6));
    take(Index<7>{}, vector_of(unit, 7));
  }
};

// Two fields a vector: low and high nibbles.
template <>
struct Fields<4> {
  template <class Take>
  HQQ_INLINE static void unpack(const std::uint8_t* unit, Take take) {
    pair<0>(unit, take);
    pair<2>(unit, take);
    pair<4>(unit, take);
    pair<6>(unit, take);
  }
  template <int kField, class Take>
  HQQ_INLINE static void pair(const std::uint8_t* unit, Take take) {
    const auto v = vector_of(unit, kField / 2);
    take(Index<kField>{}, bits_of<0, 15>(v));
    take(Index<kField + 1>{}, bits_of<4, 15>(v));
  }
};

// Four fields a vector.
template <>
struct Fields<2> {
  template <class Take>
  HQQ_INLINE static void unpack(const std::uint8_t* unit, Take take) {
    four<0>(unit, take);
    four<4>(unit, take);
  }
  template <int kField, class Take>
  HQQ_INLINE static void four(const std::uint8_t* unit, Take take) {
    const auto v = vector_of(unit, kField / 4);
    take(Index<kField>{}, bits_of<0, 3>(v));
    take(Index<kField + 1>{}, bits_of<2, 3>(v));
    take(Index<kField + 2>{}, bits_of<4, 3>(v));
    take(Index<kField + 3>{}, bits_of<6, 3>(v));
  }
};

// All fields in one vector.
template <>
struct Fields<1> {
  template <class Take>
  HQQ_INLINE static void unpack(const std::uint8_t* unit, Take take) {
    const auto v = vector_of(unit, 0);
    take(Index<0>{}, bits_of<0, 1>(v));
    take(Index<1>{}, bits_of<1, 1>(v));
    take(Index<2>{}, bits_of<2, 1>(v));
    take(Index<3>{}, bits_of<3, 1>(v));
    take(Index<4>{}, bits_of<4, 1>(v));
    take(Index<5>{}, bits_of<5, 1>(v));
    take(Index<6>{}, bits_of<6, 1>(v));
    take(Index<7>{}, bits_of<7, 1>(v));
  }
};

// Six fields in the low six bits of three bytes; the two bits that each byte has left make up two
// more.
template <>
struct Fields<3> {
  template <class Take>
  HQQ_INLINE static void unpack(const std::uint8_t* unit, Take take) {
    const auto a = vector_of(unit, 0), b = vector_of(unit, 1), c = vector_of(unit, 2);
    take(Index<0>{}, bits_of<0, 7>(a));
    take(Index<1>{}, bits_of<3, 7>(a));
    take(Index<2>{}, bits_of<0, 7>(b));
    take(Index<3>{}, bits_of<3, 7>(b));
    take(Index<4>{}, bits_of<0, 7>(c));
    take(Index<5>{}, bits_of<3, 7>(c));
    take(Index<6>{}, Isa::or_(bits_of<6, 3>(a), bits_of<4, 4>(c)));
    take(Index<7>{}, Isa::or_(bits_of<6, 3>(b), bits_of<5, 4>(c)));
  }
};

// Five fields in the low five bits of five bytes a..e; their high three bits are
// a, b: low bits of fields 5 and 6; c: low bits of field 7; d, e: bits 3-4 of fields 5 and 6, then
// bits 3 and 4 of field 7.
template <>
struct Fields<5> {
  template <class Take>
  HQQ_INLINE static void unpack(const std::uint8_t* unit, Take take) {
    const auto a = vector_of(unit, 0), b = vector_of(unit, 1), c = vector_of(unit, 2);
    const auto d = vector_of(unit, 3), e = vector_of(unit, 4);
    take(Index<0>{}, bits_of<0, 31>(a));
    take(Index<1>{}, bits_of<0, 31>(b));
    take(Index<2>{}, bits_of<0, 31>(c));
    take(Index<3>{}, bits_of<0, 31>(d));
    take(Index<4>{}, bits_of<0, 31>(e));
    take(Index<5>{}, Isa::or_(bits_of<5, 7>(a), bits_of<2, 24>(d)));
    take(Index<6>{}, Isa::or_(bits_of<5, 7>(b), bits_of<2, 24>(e)));
    take(Index<7>{}, Isa::or_(bits_of<5, 7>(c), Isa::or_(bits_of<4, 8>(d), bits_of<3, 16>(e))));
  }
};

// Six fields in the low six bits of six bytes; the high two bits of three bytes make up one more.
template <>
struct Fields<6> {
  template <class Take>
  HQQ_INLINE static void unpack(const std::uint8_t* unit, Take take) {
    const auto a = vector_of(unit, 0), b = vector_of(unit, 1), c = vector_of(unit, 2);
    const auto d = vector_of(unit, 3), e = vector_of(unit, 4), g = vector_of(unit, 5);
    take(Index<0>{}, bits_of<0, 63>(a));
    take(Index<1>{}, bits_of<0, 63>(b));
    take(Index<2>{}, bits_of<0, 63>(c));
    take(Index<3>{}, bits_of<0, 63>(d));
    take(Index<4>{}, bits_of<0, 63>(e));
    take(Index<5>{}, bits_of<0, 63>(g));
    take(Index<6>{}, rest(a, b, c));
    take(Index<7>{}, rest(d, e, g));
  }
  template <class V>
  HQQ_INLINE static V rest(V a, V b, V c) {
    return Isa::or_(bits_of<6, 3>(a), Isa::or_(bits_of<4, 12>(b), bits_of<2, 48>(c)));
  }
};
