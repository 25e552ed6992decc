// Tiles of narrow inputs and weights for AVX512-BF16 and AVX512-VNNI. Included by avx512.cpp within its target region.

__m512bh pairs(const uint16_t* x) { return (__m512bh)_mm512_loadu_si512(x); }

// A tile whose panel holds two terms of each column side by side; each instruction adds both products to the sum.
template <int ROWS>
void pair_tile(const Tile& t) {
  const uint16_t* a = static_cast<const uint16_t*>(t.a);
  const uint16_t* weight = static_cast<const uint16_t*>(t.weight);
  NextPanel next(t, sizeof(uint16_t));
  for (int64_t start = 0; start < t.depth; start += kDepthBlock) {
    const int64_t end = start + kDepthBlock < t.depth ? start + kDepthBlock : t.depth;
    __m512 sums[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t k = start; k < end; k += 2) {
      const __m512bh w0 = pairs(weight), w1 = pairs(weight + 32);
      __builtin_prefetch(weight + kAhead / 2);
      __builtin_prefetch(weight + kAhead / 2 + 32);
      next.prefetch();
      weight += t.weight_stride;
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        int pair;
        __builtin_memcpy(&pair, a + r * t.a_stride + k, sizeof(pair));
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, w0);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, w1);
      }
    }
    store_sums<Avx512, ROWS>(t, start == 0, sums);
  }
}

template <int ROWS>
void fill_pair_tiles(TileFunction* tiles) {
  tiles[ROWS - 1] = &pair_tile<ROWS>;
  if constexpr (ROWS > 1) fill_pair_tiles<ROWS - 1>(tiles);
}

void to_bfloat16(const float* x, int64_t count, void* values_out, float*, int32_t*) {
  uint16_t* out = static_cast<uint16_t*>(values_out);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256bh values = _mm512_cvtneps_pbh(_mm512_loadu_ps(x + i));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)values);
  }
  if (i < count) {
    const __mmask16 rest = static_cast<__mmask16>((1u << (count - i)) - 1);
    const __m256bh values = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(rest, x + i));
    _mm256_mask_storeu_epi16(out + i, rest, (__m256i)values);
  }
}

// Four products of a weight and an input, both bytes, at once.
struct Vnni {
  using V = Avx512;
  using I = __m512i;
  using Input = int8_t;
  static constexpr int terms = 4;
  static I set(int32_t x) { return _mm512_set1_epi32(x); }
  static I load(const uint8_t* x) { return _mm512_loadu_si512(x); }
  static I add_products(I sum, I weight, I x) { return _mm512_dpbusd_epi32(sum, weight, x); }
  static void store(float* x, I sum) { _mm512_storeu_si512(x, sum); }
  static V::R less(const float* sums, int32_t x) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums), set(x)));
  }
  static void store_inputs(Input* x, V::R values) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(values)));
  }
};
