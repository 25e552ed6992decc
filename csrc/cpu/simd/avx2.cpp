// The kernels for AVX2 with FMA and F16C.

#include "table.h"

#if defined(EE_X86)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace earlyexit::cpu {
namespace {

#include "math.h"

#include "tile.h"

__m128i half_values(const void* x) { return _mm_loadu_si128(static_cast<const __m128i*>(x)); }

struct Avx2 {
  using R = __m256;
  static constexpr int width = 8;
  static constexpr int dot_rows = 2;
  static R set(float x) { return _mm256_set1_ps(x); }
  static R load(const float* x) { return _mm256_loadu_ps(x); }
  static R load(const Float16* x) { return _mm256_cvtph_ps(half_values(x)); }
  static R load(const BFloat16* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_values(x)), 16));
  }
  static void store(float* x, R value) { _mm256_storeu_ps(x, value); }
  static R fma(R x, R y, R z) { return _mm256_fmadd_ps(x, y, z); }
  static R max(R x, R y) { return _mm256_max_ps(x, y); }
  static R min(R x, R y) { return _mm256_min_ps(x, y); }
  static R abs(R x) { return _mm256_andnot_ps(set(-0.0f), x); }
  static R round(R x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static R where_negative(R x, R yes, R no) { return _mm256_blendv_ps(no, yes, x); }
  static R power_of_two(R n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static float sum(R x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
  }
  static float largest(R x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
  }
};

// Two products of 16 bits at once. `vpmaddubsw`, which multiplies bytes, would saturate, and with the signs moved from the
// inputs to the weights it would take more instructions and registers.
struct Pairs {
  using Sum = __m256i;
  using Input = int16_t;
  static Sum set(int32_t x) { return _mm256_set1_epi32(x); }
  static Sum load(const uint8_t* x) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  static Sum multiply_add(Sum sum, Sum weight, Sum x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(weight, x)); }
  static void store(float* x, Sum sum) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), sum); }
  static __m256 less(const float* sums, int32_t x) {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums)), set(x)));
  }
  static void store_inputs(Input* x, __m256 values) {
    const __m256i whole = _mm256_cvtps_epi32(values);
    const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), narrow);
  }
};

Kernels make() {
  constexpr int kRows = 6;
  Kernels kernels = float_kernels<Avx2, kRows>("AVX2");
  add_tiles<Avx2, Bytes<Avx2, Pairs>, kRows>(kernels.formats[static_cast<int>(WeightType::kInt8)]);
  return kernels;
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = make();
  return &kernels;
}

}  // namespace earlyexit::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
