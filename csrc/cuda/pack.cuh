// Loads of the three dtypes, sixteen bytes at a time.
#pragma once

#include <cuda_fp16.h>

#include "kernels.h"

namespace earlyexit {

struct Float32 {
  using Bits = uint32_t;
  static __device__ float value(Bits bits) { return __uint_as_float(bits); }
};

struct Float16 {
  using Bits = uint16_t;
  static __device__ float value(Bits bits) { return __half2float(__ushort_as_half(bits)); }
};

struct BFloat16 {
  using Bits = uint16_t;
  static __device__ float value(Bits bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
};

// Calls f with the type of a dtype.
template <class F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(Float32{});
    case Dtype::kFloat16: return f(Float16{});
    case Dtype::kBFloat16: return f(BFloat16{});
  }
}

// Stored in words: a 16-bit value would take a whole register.
template <class T>
struct Pack {
  using Bits = typename T::Bits;
  static constexpr int kSize = kPackBytes / sizeof(Bits);
  static constexpr int kPerWord = sizeof(uint32_t) / sizeof(Bits);
  uint32_t words[kPackBytes / sizeof(uint32_t)] = {};

  __device__ float value(int e) const {
    return T::value(static_cast<Bits>(words[e / kPerWord] >> (e % kPerWord * 16)));
  }
};

template <class T>
__device__ Pack<T> as_pack(uint4 words) {
  return {{words.x, words.y, words.z, words.w}};
}

// Loads a whole pack from p, which is aligned to it.
template <class T>
__device__ Pack<T> load_pack(const typename T::Bits* p) {
  return as_pack<T>(*reinterpret_cast<const uint4*>(p));
}

}  // namespace earlyexit
