// The kernels for AVX-512 (F, BW, DQ, VL); the instructions for narrow types are used where the processor has them.

#include "table.h"

#if defined(EE_X86)
#include <immintrin.h>

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // false warnings about GCC's own headers (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,fma,f16c")
#endif

namespace earlyexit::cpu {
namespace {

#include "math.h"

#include "tile.h"

__m256i half_values(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }

struct Avx512 {
  using R = __m512;
  static constexpr int width = 16;
  static constexpr int dot_rows = 4;
  static R set(float x) { return _mm512_set1_ps(x); }
  static R load(const float* x) { return _mm512_loadu_ps(x); }
  static R load(const Float16* x) { return _mm512_cvtph_ps(half_values(x)); }
  static R load(const BFloat16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_values(x)), 16));
  }
  static void store(float* x, R value) { _mm512_storeu_ps(x, value); }
  static R fma(R x, R y, R z) { return _mm512_fmadd_ps(x, y, z); }
  static R max(R x, R y) { return _mm512_max_ps(x, y); }
  static R min(R x, R y) { return _mm512_min_ps(x, y); }
  static R abs(R x) { return _mm512_abs_ps(x); }
  static R round(R x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static R where_negative(R x, R yes, R no) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), no, yes);
  }
  static R power_of_two(R n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
  }
  static float sum(R x) { return _mm512_reduce_add_ps(x); }
  static float largest(R x) { return _mm512_reduce_max_ps(x); }
};

// Two products of bfloat16 at once, where a panel holds two terms of each column side by side.
struct BFloat16Pairs : FloatSums<Avx512> {
  using Weight = uint16_t;
  using Input = uint16_t;
  static constexpr int terms = 2;
  static Sum load(const Weight* x) { return _mm512_loadu_ps(x); }
  static Sum input(const Input* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof(pair));
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
  }
  static Sum multiply_add(Sum sum, Sum weight, Sum x) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)weight); }

  static void narrow(const float* x, int64_t count, void* out, float*, int32_t*) {
    uint16_t* to = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 within = count - i < 16 ? static_cast<__mmask16>((1u << (count - i)) - 1) : 0xffff;
      const __m256bh values = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(within, x + i));
      _mm256_mask_storeu_epi16(to + i, within, (__m256i)values);
    }
  }
};

// Four products of a weight and an input, both bytes, at once.
struct Vnni {
  using Sum = __m512i;
  using Input = int8_t;
  static Sum set(int32_t x) { return _mm512_set1_epi32(x); }
  static Sum load(const uint8_t* x) { return _mm512_loadu_si512(x); }
  static Sum multiply_add(Sum sum, Sum weight, Sum x) { return _mm512_dpbusd_epi32(sum, weight, x); }
  static void store(float* x, Sum sum) { _mm512_storeu_si512(x, sum); }
  static __m512 less(const float* sums, int32_t x) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums), set(x)));
  }
  static void store_inputs(Input* x, __m512 values) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(values)));
  }
};

Kernels make(bool has_bfloat16, bool has_vnni) {
  constexpr int kRows = 14;
  Kernels kernels = float_kernels<Avx512, kRows>("AVX-512");
  Format* formats = kernels.formats;
  if (has_bfloat16) add_tiles<Avx512, BFloat16Pairs, kRows>(formats[static_cast<int>(WeightType::kBFloat16)]);
  if (has_vnni) add_tiles<Avx512, Bytes<Avx512, Vnni>, kRows>(formats[static_cast<int>(WeightType::kInt8)]);
  return kernels;
}

}  // namespace

const Kernels* avx512_kernels(bool has_bfloat16, bool has_vnni) {
  static const Kernels kernels = make(has_bfloat16, has_vnni);
  return &kernels;
}

}  // namespace earlyexit::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
