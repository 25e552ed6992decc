// An exit on CUDA. One block runs one row: pooling, linear head, decision, and the answer if the row leaves. The order
// of every sum depends on the dtype, the width and the length of the row only.
#pragma once

#include "block.cuh"
#include "pack.cuh"
#include "ticket.cuh"

namespace earlyexit {

// Computes sums [groups, padded] over tokens first .. end; each group of threads adds every groups-th token.
template <class T>
__device__ void sum_tokens(const Call& call, const Frame& frame, int64_t first, int64_t end, float* sums) {
  using Bits = typename T::Bits;
  constexpr int kSize = Pack<T>::kSize;
  constexpr int kInFlight = 8;
  const int group = threadIdx.x / frame.columns;
  if (group >= frame.groups) return;
  const int64_t step = frame.groups * call.width;
#pragma unroll 1
  for (int64_t k = threadIdx.x % frame.columns * kSize; k < frame.padded; k += frame.columns * kSize) {
    const Bits* p = static_cast<const Bits*>(call.input) + (first + group) * call.width + k;
    float sum[kSize] = {};
#pragma unroll 1
    for (int64_t t = first + group; t < end; t += kInFlight * frame.groups) {
      Pack<T> packs[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (t + u * frame.groups < end) packs[u] = load_pack<T>(p);
        p += step;
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) sum[e] += packs[u].value(e);
      }
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e) sums[group * frame.padded + k + e] = sum[e];
  }
}

// Computes these sums, in the same order, where a row of the input is not made of whole packs.
template <class T>
__device__ void sum_values(const Call& call, const Frame& frame, int64_t first, int64_t end, float* sums) {
  const int group = threadIdx.x / frame.columns;
  if (group >= frame.groups) return;
#pragma unroll 1
  for (int64_t k = threadIdx.x % frame.columns; k < frame.padded; k += frame.columns) {
    const auto* p = static_cast<const typename T::Bits*>(call.input) + k;
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t t = first + group; t < end && k < call.width; t += frame.groups) sum += T::value(p[t * call.width]);
    sums[group * frame.padded + k] = sum;
  }
}

// Pools tokens first .. end into one float32 vector, zero-padded to `padded`.
template <class T>
__device__ void pool(const Call& call, const Frame& frame, int64_t first, int64_t end, float* pooled) {
  if (frame.input_aligned) {
    sum_tokens<T>(call, frame, first, end, pooled);
  } else {
    sum_values<T>(call, frame, first, end, pooled);
  }
  __syncthreads();
  if (!call.pools_mean()) return;
  const float tokens = static_cast<float>(end - first);
#pragma unroll 1
  for (int64_t h = threadIdx.x; h < frame.padded; h += blockDim.x) {
    float sum = pooled[h];
#pragma unroll 1
    for (int group = 1; group < frame.groups; ++group) sum += pooled[group * frame.padded + h];
    pooled[h] = sum / tokens;
  }
  __syncthreads();
}

// Adds the products of the values start .. of a class's weight that one lane multiplies.
template <class T>
__device__ float dot_packs(const Call& call, const typename T::Bits* weight, int64_t start, const float* pooled) {
  constexpr int kSize = Pack<T>::kSize;
  constexpr int kInFlight = 4;
  constexpr int kStep = kWarp * kSize;
  float sum = 0.0f;
#pragma unroll 1
  for (; start < call.width; start += kInFlight * kStep) {
    Pack<T> packs[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (start + u * kStep < call.width) packs[u] = load_pack<T>(weight + start + u * kStep);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t k = start + u * kStep;
      if (k >= call.width) break;
#pragma unroll
      for (int e = 0; e < kSize; ++e) sum += packs[u].value(e) * pooled[k + e];
    }
  }
  return sum;
}

// Adds them, in the same order, where the weight is not made of whole packs.
template <class T>
__device__ float dot_values(const Call& call, const typename T::Bits* weight, int64_t start, const float* pooled) {
  constexpr int kSize = Pack<T>::kSize;
  float sum = 0.0f;
#pragma unroll 1
  for (; start < call.width; start += kWarp * kSize) {
    const int64_t end = start + kSize < call.width ? start + kSize : call.width;
#pragma unroll 1
    for (int64_t k = start; k < end; ++k) sum += T::value(weight[k]) * pooled[k];
  }
  return sum;
}

// Computes the logits with one warp per class, whose lanes are adjacent along the width.
template <class T>
__device__ void linear(const Call& call, const Frame& frame, const float* pooled, float* z, float* answer) {
  using Bits = typename T::Bits;
  const int lane = threadIdx.x % kWarp;
  const int64_t start = lane * Pack<T>::kSize;
#pragma unroll 1
  for (int64_t c = threadIdx.x / kWarp; c < call.classes; c += blockDim.x / kWarp) {
    const Bits* weight = static_cast<const Bits*>(call.weight) + c * call.width;
    float sum = frame.weight_aligned ? dot_packs<T>(call, weight, start, pooled)
                                     : dot_values<T>(call, weight, start, pooled);
    for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
    if (lane == 0) z[c] = answer[c] = sum + T::value(static_cast<const Bits*>(call.bias)[c]);
  }
}

template <class T>
__device__ void copy_logits(const Call& call, int64_t i, float* z, float* answer) {
  const auto* logits = static_cast<const typename T::Bits*>(call.input) + i * call.classes;
#pragma unroll 1
  for (int64_t c = threadIdx.x; c < call.classes; c += blockDim.x) z[c] = answer[c] = T::value(logits[c]);
}

// Runs the exit of row i with scratch memory `scratch` [frame.floats]; returns whether it is a live row with invalid
// logits. One thread decides: the criteria are sequential, and the rows of a batch provide the parallelism.
template <class T, class Criterion>
__device__ bool step_row(const Call& call, const Frame& frame, int64_t i, float* scratch) {
  __shared__ Decision decision;
  const int64_t first = call.pools_tokens() ? call.offsets[i] : i;
  const int64_t end = call.pools_mean() ? call.offsets[i + 1] : first + 1;
  const int64_t n = call.row_ids[i];
  if (n < 0) return false;
  float* z = scratch + frame.groups * frame.padded;
  float* answer = z + call.classes;
  if (call.weight == nullptr) {
    copy_logits<T>(call, i, z, answer);
  } else {
    pool<T>(call, frame, first, end, scratch);
    linear<T>(call, frame, scratch, z, answer);
  }
  __syncthreads();
  if (threadIdx.x == 0) decision = decide<Criterion>(call, i, n, z, answer);
  __syncthreads();
  if (decision.leaves) {
#pragma unroll 1
    for (int64_t c = threadIdx.x; c < call.classes; c += blockDim.x) call.answers[n * call.classes + c] = answer[c];
    if (threadIdx.x == 0) {
      call.exit_layer[n] = call.layer;
      call.row_ids[i] = -1;
    }
  }
  return decision.invalid;
}

// One block per row, for any number of rows, and one kernel per rule, which keeps each of them small. All threads of the last block to finish call `finish` with the counts of
// live and of invalid rows.
template <class T, class Criterion, class Finish>
__global__ void __launch_bounds__(kMeanThreads, kMeanBlocks)
    exit_kernel(const __grid_constant__ Call call, const __grid_constant__ Frame frame, Counts* ticket,
                const __grid_constant__ Finish finish) {
  extern __shared__ __align__(16) float shared[];
  float* scratch = frame.scratch == nullptr ? shared : frame.scratch + blockIdx.x * frame.floats;
  const bool invalid = step_row<T, Criterion>(call, frame, blockIdx.x, scratch);
  int32_t invalid_rows;
  if (!arrive(ticket, invalid, invalid_rows)) return;
  finish(call, count_live(call.row_ids, call.offsets, call.rows), invalid_rows);
}

template <class Finish>
void launch_rows(const Call& call, const Frame& frame, Dtype dtype, int32_t* counts, const Finish& finish,
                 cudaStream_t stream) {
  auto* ticket = reinterpret_cast<Counts*>(counts + kTicket);
  const size_t shared_bytes = frame.scratch == nullptr ? frame.floats * sizeof(float) : 0;
  with_type(dtype, [&](auto type) {
    with_rule(call.rule, [&](auto rule) {
      const auto kernel = exit_kernel<decltype(type), decltype(rule), Finish>;
      kernel<<<call.rows, frame.threads, shared_bytes, stream>>>(call, frame, ticket, finish);
    });
  });
}

}  // namespace earlyexit
