// Entries of an instruction set's table. Included inside its namespace, after panel-inl.hpp.

// Calls fill(Index<i>, Index<bits>) for all widths.
template <class Fill>
void for_field_packings(Fill fill) {
  unrolled<kNumFieldPackings>(
      [&](auto index) { fill(index, Index<kFieldPackings[decltype(index)::value].bits>{}); });
}

[[maybe_unused]] void fill_panels_fast(LinearKernels& k) {
  for_field_packings([&](auto index, auto bits) {
    k.panel_fast[decltype(index)::value] = panel_fast<decltype(bits)::value>;
  });
}

[[maybe_unused]] void fill_panels_exact(LinearKernels& k) {
  for_field_packings([&](auto index, auto bits) {
    k.panel_exact[decltype(index)::value] = panel_exact<decltype(bits)::value>;
  });
}

#ifndef HQQ_NO_DECODE
[[maybe_unused]] void fill_decode_fast(LinearKernels& k) {
  for_field_packings([&](auto index, auto width) {
    constexpr int kBits = decltype(width)::value;
    auto& table = k.decode_fast[decltype(index)::value];
    table[0][0] = decode_tile<true, kBits, 1, std::uint16_t>;
    table[0][1] = decode_tile<true, kBits, 1, float>;
    table[1][0] = decode_tile<true, kBits, 2, std::uint16_t>;
    table[1][1] = decode_tile<true, kBits, 2, float>;
    table[2][0] = decode_tile<true, kBits, 4, std::uint16_t>;
    table[2][1] = decode_tile<true, kBits, 4, float>;
  });
}

[[maybe_unused]] void fill_decode_exact(LinearKernels& k) {
  for_field_packings([&](auto index, auto width) {
    constexpr int kBits = decltype(width)::value;
    auto& table = k.decode_exact[decltype(index)::value];
    table[0][0] = decode_tile<false, kBits, 1, std::uint16_t>;
    table[0][1] = decode_tile<false, kBits, 1, float>;
    // Two rows take little less time than four; float16 is widened before.
    table[1][1] = decode_tile<false, kBits, 4, float>;
  });
}
#endif

[[maybe_unused]] void fill_activations(LinearKernels& k) {
  k.quantize_x = quantize_x;
  k.copy_x = copy_x;
  k.weighted_sum = weighted_sum;
  k.quantize_scaled_x = quantize_scaled_x;
  k.read_u8 = read_u8;
  k.read_f16 = read_f16;
}

// The table of an instruction set that has all kernels of its own.
[[maybe_unused]] LinearKernels all_kernels(const char* name) {
  LinearKernels k{};
  k.name = name;
#ifndef HQQ_NO_DECODE
  fill_decode_fast(k);
  fill_decode_exact(k);
#endif
  fill_panels_fast(k);
  fill_panels_exact(k);
  fill_activations(k);
  return k;
}
