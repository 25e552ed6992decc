// The kernels for AVX-512 (F, BW, DQ, VL); the instructions for narrow types are used where the processor has them.

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // false warnings about GCC's own headers (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,fma,f16c")
#endif

namespace earlyexit::cpu {
namespace {

#include "vector_code.h"

#include "byte_code.h"

__m256i half_values(const uint16_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }

struct Avx512 {
  using R = __m512;
  static constexpr int width = 16;
  static constexpr int dot_rows = 4;
  static R set(float x) { return _mm512_set1_ps(x); }
  static R load(const float* x) { return _mm512_loadu_ps(x); }
  static R load_float16(const uint16_t* x) { return _mm512_cvtph_ps(half_values(x)); }
  static R load_bfloat16(const uint16_t* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_values(x)), 16));
  }
  static void store(float* x, R value) { _mm512_storeu_ps(x, value); }
  static R add(R x, R y) { return _mm512_add_ps(x, y); }
  static R sub(R x, R y) { return _mm512_sub_ps(x, y); }
  static R mul(R x, R y) { return _mm512_mul_ps(x, y); }
  static R div(R x, R y) { return _mm512_div_ps(x, y); }
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

constexpr int kRows = 14;

#include "avx512_narrow.h"

Kernels make(bool has_bfloat16, bool has_vnni) {
  Kernels kernels = common_kernels<Avx512, kRows>("AVX-512");
  if (has_bfloat16) {
    fill_pair_tiles<kRows>(kernels.tiles[2]);
    kernels.terms[2] = 2;
    kernels.input_bytes[2] = sizeof(uint16_t);
    kernels.narrow[2] = to_bfloat16;
  }
  if (has_vnni) add_byte_kernels<Vnni, kRows>(kernels);
  return kernels;
}

}  // namespace
}  // namespace earlyexit::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace earlyexit::cpu {

const Kernels* avx512_kernels() {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return nullptr;
  }
  static const Kernels kernels = make(__builtin_cpu_supports("avx512bf16"), __builtin_cpu_supports("avx512vnni"));
  return &kernels;
}

}  // namespace earlyexit::cpu
#else
namespace earlyexit::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace earlyexit::cpu
#endif
