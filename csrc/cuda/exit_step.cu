// exit_step on CUDA. One block runs one row: pooling, linear head, decision, and the answer if the row leaves. The order
// of every sum depends on the dtype, the width and the length of the row only.

#include "linear_head.cuh"

namespace earlyexit {
namespace {

template <class T>
__device__ const typename T::Bits* token(const Call& call, const Frame& frame, int t) {
  return static_cast<const typename T::Bits*>(call.input) + static_cast<int64_t>(t) * frame.width;
}

template <class T>
__device__ void store_pack(const float (&values)[Pack<T>::kSize], float* to) {
  EE_UNROLLED for (int e = 0; e < Pack<T>::kSize; e += 4) {
    *reinterpret_cast<float4*>(to + e) = {values[e], values[e + 1], values[e + 2], values[e + 3]};
  }
}

// Copies a token.
template <class T>
__device__ void copy_token(const Call& call, const Frame& frame, int t, float* pooled) {
  constexpr int kSize = Pack<T>::kSize;
  EE_ROLLED for (int k = threadIdx.x * kSize; k < frame.width; k += blockDim.x * kSize) {
    const Pack<T> pack = load_pack<T>(token<T>(call, frame, t) + k);
    float values[kSize];
    EE_UNROLLED for (int e = 0; e < kSize; ++e) values[e] = pack.value(e);
    store_pack<T>(values, pooled + k);
  }
}

// Computes sums [groups, width] over tokens first .. end; each group of threads adds every groups-th token.
template <class T>
__device__ void sum_tokens(const Call& call, const Frame& frame, int first, int end, float* sums) {
  constexpr int kSize = Pack<T>::kSize;
  constexpr int kInFlight = 8;
  constexpr int kAdded = 32 / kSize;  // packs whose code is repeated
  const int group = frame.columns.divide(threadIdx.x);
  const int column = threadIdx.x - group * frame.columns.by;
  if (group >= frame.groups) return;
  const uint32_t step = frame.groups * frame.width;
  EE_ROLLED for (int k = column * kSize; k < frame.width; k += frame.columns.by * kSize) {
    float sum[kSize] = {};
    EE_ROLLED for (int t = first + group; t < end; t += kInFlight * frame.groups) {
      const auto* p = token<T>(call, frame, t) + k;
      asm("" : "+l"(p));  // otherwise each of the addresses below is computed from that of the input
      Pack<T> packs[kInFlight];
      EE_UNROLLED for (int u = 0; u < kInFlight; ++u) {
        if (t + u * frame.groups < end) packs[u] = load_pack<T>(p + static_cast<uint64_t>(step) * u);
      }
      // in order; a loop, so that every load is in flight before the first of them is awaited
      EE_ROLLED for (int added = 0; added < kInFlight; added += kAdded) {
        EE_UNROLLED for (int u = 0; u < kAdded; ++u) {
          EE_UNROLLED for (int e = 0; e < kSize; ++e) sum[e] += packs[u].value(e);
        }
        EE_UNROLLED for (int u = kAdded; u < kInFlight; ++u) packs[u - kAdded] = packs[u];
      }
    }
    store_pack<T>(sum, sums + group * frame.width + k);
  }
}

// Computes the mean of tokens first .. end, or copies the first of them, as float32.
template <class T>
__device__ void pool(const Call& call, const Frame& frame, int first, int end, float* pooled) {
  if (call.pools_mean()) {
    sum_tokens<T>(call, frame, first, end, pooled);
  } else {
    copy_token<T>(call, frame, first, pooled);
  }
  __syncthreads();
  if (!call.pools_mean()) return;
  const float tokens = static_cast<float>(end - first);
  EE_ROLLED for (int h = threadIdx.x; h < frame.width; h += blockDim.x) {
    float sum = pooled[h];
    EE_ROLLED for (int group = 1; group < frame.groups; ++group) sum += pooled[group * frame.width + h];
    pooled[h] = sum / tokens;
  }
  __syncthreads();
}

template <class T>
__device__ void copy_logits(const Call& call, const Frame& frame, int i, float* z, float* answer) {
  const auto* logits = static_cast<const typename T::Bits*>(call.input) + static_cast<int64_t>(i) * frame.classes;
  EE_ROLLED for (int c = threadIdx.x; c < frame.classes; c += blockDim.x) z[c] = answer[c] = T::value(logits[c]);
}

struct Outcome {
  bool live = false;
  bool invalid = false;
  int32_t tokens = 0;
};

// Runs the exit of row i and returns what it adds to the counts, to thread 0. What does not depend on the row id is in
// flight before it is known. One thread decides: the criteria are sequential, and the rows of a batch provide the
// parallelism.
template <class T, class Criterion>
__device__ Outcome step_row(const Call& call, const Frame& frame, int i, float* shared) {
  __shared__ Decision decision;
  __shared__ float aux;  // of thread 0, which decides: the sums leave no register for it
  const FirstClass<T> head = start_linear<T>(call, frame, shared);
  const int n = call.row_ids[i];
  const float own_aux = aux_of<Criterion>(call, i);
  const int begin = call.offsets != nullptr ? call.offsets[i] : i;
  const int after = call.offsets != nullptr ? call.offsets[i + 1] : i + 1;
  if (n < 0) {
    wait_for_copies();
    return {};
  }
  if (Criterion::needs_aux && threadIdx.x == 0) aux = own_aux;
  float* scratch = frame.scratch != nullptr ? frame.scratch + i * frame.floats : shared + frame.staged;
  if (call.weight != nullptr) pool<T>(call, frame, call.pools_tokens() ? begin : i, after, scratch);
  float* z = scratch + frame.sums;
  float* answer = z + frame.classes;
  asm("" : "+l"(z), "+l"(answer));  // otherwise each address below is computed from that of the scratch memory
  if (call.weight == nullptr) {
    copy_logits<T>(call, frame, i, z, answer);
  } else {
    linear<T>(call, frame, head, scratch, z, answer);
  }
  __syncthreads();
  if (threadIdx.x == 0) decision = decide<Criterion>(call, n, Criterion::needs_aux ? aux : 0.0f, z, answer);
  __syncthreads();
  if (!decision.leaves) return {true, decision.invalid, after - begin};
  float* to = call.answers + static_cast<int64_t>(n) * frame.classes;
  EE_ROLLED for (int c = threadIdx.x; c < frame.classes; c += blockDim.x) to[c] = answer[c];
  if (threadIdx.x == 0) {
    call.exit_layer[n] = call.layer;
    call.row_ids[i] = -1;
  }
  return {false, decision.invalid, 0};
}

// One block per row, for any number of rows, and one kernel per rule, which keeps each of them small.
template <class T, class Criterion>
__global__ void __launch_bounds__(kMeanThreads, kMeanBlocks)
    exit_kernel(const __grid_constant__ Call call, const __grid_constant__ Frame frame, int32_t* counts) {
  extern __shared__ __align__(16) float shared[];
  const Outcome own = step_row<T, Criterion>(call, frame, blockIdx.x, shared);
  if (threadIdx.x > 0) return;
  if (own.live) {
    atomicAdd(counts, 1);
    atomicAdd(counts + 1, own.tokens);
  }
  if (own.invalid) atomicAdd(counts + 2, 1);
}

}  // namespace

void launch_exit_step(const Call& call, const Frame& frame, Dtype dtype, int32_t* counts, cudaStream_t stream) {
  const int64_t shared_bytes = frame.shared_bytes();
  with_type(dtype, [&](auto type) {
    with_rule(call.rule, [&](auto rule) {
      const auto kernel = exit_kernel<decltype(type), decltype(rule)>;
      kernel<<<call.rows, frame.threads, shared_bytes, stream>>>(call, frame, counts);
    });
  });
}

}  // namespace earlyexit
