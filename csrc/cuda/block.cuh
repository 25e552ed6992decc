// Functions for all threads of a block: the plan of a compaction.
#pragma once

#include "kernels.h"

namespace earlyexit {

constexpr unsigned kAllLanes = 0xffffffffu;

// Two counts packed into one number, so that one sum adds both: rows in the upper half, tokens in the lower.
using Counts = unsigned long long;

__device__ inline Counts new_counts(int32_t rows, int32_t tokens) {
  return static_cast<Counts>(rows) << 32 | static_cast<Counts>(tokens);
}
__device__ inline int32_t rows_of(Counts counts) { return static_cast<int32_t>(counts >> 32); }
__device__ inline int32_t tokens_of(Counts counts) { return static_cast<int32_t>(counts & 0xffffffffu); }

// Returns the inclusive prefix sum of `mine`; `total` is the sum of the block. All threads must call it, in whole
// warps.
__device__ inline Counts scan_block(Counts mine, Counts& total) {
  __shared__ Counts sums[kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
#pragma unroll 1
  for (int step = 1; step < kWarp; step *= 2) {
    const Counts left = __shfl_up_sync(kAllLanes, mine, step);
    if (lane >= step) mine += left;
  }
  if (lane == kWarp - 1) sums[warp] = mine;
  __syncthreads();
  total = 0;
  Counts before = 0;
#pragma unroll 1
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    if (w == warp) before = total;
    total += sums[w];
  }
  __syncthreads();  // before the next scan writes `sums`
  return before + mine;
}

__device__ inline void copy_block(const int32_t* from, int32_t* to, uint32_t count) {
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

// Plans the new positions: live rows first, in order, packed from token `start` on, followed by ids of -1 without
// tokens. `new_ids` may be `row_ids`, because rows only move down and the block reads a range before it writes it. The
// offsets must be another array.
__device__ inline void plan_rows(const int32_t* row_ids, const int32_t* offsets, int32_t* new_ids, int32_t* new_offsets,
                                 int32_t* source, uint32_t rows, int32_t start) {
  Counts done = 0;
#pragma unroll 1
  for (uint32_t range = 0; range < rows; range += blockDim.x) {
    const uint32_t i = range + threadIdx.x;
    // past the L1 cache, which does not see the writes of other blocks
    const int32_t id = i < rows ? __ldcg(row_ids + i) : -1;
    const int32_t tokens = id < 0 ? 0 : offsets[i + 1] - offsets[i];
    const Counts mine = id < 0 ? 0 : new_counts(1, tokens);
    Counts total;
    const Counts end = done + scan_block(mine, total);
    if (id >= 0) {
      const int32_t to = rows_of(end) - 1;
      new_ids[to] = id;
      source[to] = static_cast<int32_t>(i);
      new_offsets[to + 1] = start + tokens_of(end);
    }
    done += total;
  }
  if (threadIdx.x == 0) new_offsets[0] = start;
#pragma unroll 1
  for (uint32_t j = rows_of(done) + threadIdx.x; j < rows; j += blockDim.x) {
    new_ids[j] = -1;
    source[j] = -1;
    new_offsets[j + 1] = start + tokens_of(done);
  }
}

}  // namespace earlyexit
