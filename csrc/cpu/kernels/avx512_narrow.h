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

void to_bfloat16(const float* x, int64_t count, uint16_t* out) {
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

__m512i bytes(const void* x) { return _mm512_loadu_si512(x); }

// Panels hold four terms of each column side by side, as bytes x + 128; each instruction adds four products to the sum.
// The sums of integers are exact, and (sum - 128 * row sum) * row scale * column scale is the product.
template <int ROWS>
void byte_tile(const Tile& t) {
  const int8_t* a = static_cast<const int8_t*>(t.a);
  const uint8_t* weight = static_cast<const uint8_t*>(t.weight);
  NextPanel next(t, sizeof(uint8_t));
  __m512i sums[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
  for (int64_t k = 0; k < t.depth; k += 4) {
    const __m512i w0 = bytes(weight), w1 = bytes(weight + 64);
    __builtin_prefetch(weight + kAhead);
    __builtin_prefetch(weight + kAhead + 64);
    next.prefetch();
    weight += t.weight_stride;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      int four;
      __builtin_memcpy(&four, a + r * t.a_stride + k, sizeof(four));
      const __m512i x = _mm512_set1_epi32(four);
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], w0, x);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], w1, x);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {  // in two steps, since GCC keeps the sums in memory otherwise
    _mm512_storeu_si512(t.out + r * t.out_stride, sums[r][0]);
    _mm512_storeu_si512(t.out + r * t.out_stride + 16, sums[r][1]);
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int c = 0; c < 32; c += 16) {
      float* out = t.out + r * t.out_stride + c;
      const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(out), _mm512_set1_epi32(128 * t.row_sums[r]));
      const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(t.row_scales[r]));
      _mm512_storeu_ps(out, _mm512_fmadd_ps(product, _mm512_loadu_ps(t.column_scales + c), _mm512_loadu_ps(t.bias + c)));
    }
  }
}

template <int ROWS>
void fill_byte_tiles(TileFunction* tiles) {
  tiles[ROWS - 1] = &byte_tile<ROWS>;
  if constexpr (ROWS > 1) fill_byte_tiles<ROWS - 1>(tiles);
}

__m512 some_values(const float* x, int64_t count) {
  return count >= 16 ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), x);
}

void to_int8(const float* x, int64_t count, int8_t* out, float* scale, int32_t* sum) {
  __m512 most = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 values = some_values(x + i, count - i);
    most = _mm512_max_ps(most, _mm512_abs_ps(values));
    poison = _mm512_fmadd_ps(values, _mm512_setzero_ps(), poison);  // NaN where a value is not finite
  }
  const float largest = _mm512_reduce_max_ps(most) + _mm512_reduce_add_ps(poison);
  const __m512 factor = _mm512_set1_ps(largest > 0.0f ? 127.0f / largest : 0.0f);
  __m512i sums = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(some_values(x + i, count - i), factor));
    sums = _mm512_add_epi32(sums, rounded);
    const __mmask16 present = count - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - i)) - 1);
    _mm_mask_storeu_epi8(out + i, present, _mm512_cvtsepi32_epi8(rounded));
  }
  *scale = largest / 127.0f;
  *sum = _mm512_reduce_add_epi32(sums);
}
