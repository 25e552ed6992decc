// The linear head of an exit: one warp per class. The lane that multiplies a pack of the weight also copies it to
// shared memory, so that no other thread waits for the copy.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "pack.cuh"

namespace earlyexit {

// Waits for the copies that this thread has started.
__device__ inline void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

template <class T>
__device__ const typename T::Bits* class_weight(const Call& call, const Frame& frame, int c, int k) {
  return static_cast<const typename T::Bits*>(call.weight) + static_cast<int64_t>(c) * frame.width + k;
}

// Starts the copy of the packs that this lane multiplies, `frame.chunk` of them from value k of class c on.
template <class T>
__device__ void copy_packs(const Call& call, const Frame& frame, int c, int k, uint4* chunk) {
  constexpr int kStep = kWarp * Pack<T>::kSize;
  k += threadIdx.x % kWarp * Pack<T>::kSize;
  const auto* from = class_weight<T>(call, frame, c, k);
  const int end = min(frame.width, k + frame.chunk * kStep);
  EE_ROLLED for (; k < end; k += kStep, from += kStep, chunk += kWarp) __pipeline_memcpy_async(chunk, from, kPackBytes);
}

// Returns `sum` plus the products of that chunk with the pooled values from k on.
template <class T>
__device__ float add_products(const Call& call, const Frame& frame, const float* pooled, int k, const uint4* chunk,
                              float sum) {
  constexpr int kStep = kWarp * Pack<T>::kSize;
  k += threadIdx.x % kWarp * Pack<T>::kSize;
  const int end = min(frame.width, k + frame.chunk * kStep);
  EE_ROLLED for (; k < end; k += kStep, chunk += kWarp) {
    const Pack<T> pack = as_pack<T>(*chunk);
    const auto* factors = reinterpret_cast<const float4*>(pooled + k);
    EE_UNROLLED for (int e = 0; e < Pack<T>::kSize; e += 4) {
      const float4 four = factors[e / 4];
      sum += pack.value(e) * four.x;
      sum += pack.value(e + 1) * four.y;
      sum += pack.value(e + 2) * four.z;
      sum += pack.value(e + 3) * four.w;
    }
  }
  return sum;
}

// What a warp has of its first class before its row is known.
template <class T>
struct FirstClass {
  uint4* chunk;  // of this lane, in shared memory
  typename T::Bits bias;
};

template <class T>
__device__ FirstClass<T> start_linear(const Call& call, const Frame& frame, float* shared) {
  const int c = threadIdx.x / kWarp;
  auto* chunk = reinterpret_cast<uint4*>(shared) + c * frame.chunk * kWarp + threadIdx.x % kWarp;
  if (c >= frame.classes || call.weight == nullptr) return {chunk, 0};
  copy_packs<T>(call, frame, c, 0, chunk);
  return {chunk, static_cast<const typename T::Bits*>(call.bias)[c]};
}

// Computes the logits of the row.
template <class T>
__device__ void linear(const Call& call, const Frame& frame, FirstClass<T> first, const float* pooled, float* z,
                       float* answer) {
  const int own = threadIdx.x / kWarp;
  const int values = frame.chunk * kWarp * Pack<T>::kSize;
  auto bias = first.bias;
  EE_ROLLED for (int c = own; c < frame.classes; c += blockDim.x / kWarp) {
    if (c != own) bias = static_cast<const typename T::Bits*>(call.bias)[c];
    float sum = 0.0f;
    EE_ROLLED for (int k = 0; k < frame.width; k += values) {
      if (c != own || k > 0) copy_packs<T>(call, frame, c, k, first.chunk);
      wait_for_copies();
      sum = add_products<T>(call, frame, pooled, k, first.chunk, sum);
    }
    EE_ROLLED for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
    if (threadIdx.x % kWarp == 0) z[c] = answer[c] = sum + T::value(bias);
  }
}

}  // namespace earlyexit
