// Functions for all threads of a block: counts of rows and tokens, and the plan of a compaction.
#pragma once

#include <cstdint>

namespace earlyexit {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Rows per thread with loads in flight at a time; these functions run in one block, where latency is the only cost.
constexpr int kRowsPerThread = 8;

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

// Returns the live rows of a batch and their tokens (one per row without offsets) to all threads of the block. Reads
// the row ids past the L1 cache, which does not see the writes of other blocks.
__device__ inline Counts count_live(const int32_t* row_ids, const int32_t* offsets, uint32_t rows) {
  Counts mine = 0;
#pragma unroll 1
  for (uint32_t first = threadIdx.x; first < rows; first += kRowsPerThread * blockDim.x) {
    Counts row[kRowsPerThread];
#pragma unroll
    for (int u = 0; u < kRowsPerThread; ++u) {
      const uint32_t i = first + u * blockDim.x;
      const int32_t n = i < rows ? __ldcg(row_ids + i) : -1;
      const int32_t tokens = i < rows && offsets != nullptr ? offsets[i + 1] - offsets[i] : 1;
      row[u] = n < 0 ? 0 : new_counts(1, tokens);
    }
#pragma unroll
    for (int u = 0; u < kRowsPerThread; ++u) mine += row[u];
  }
  Counts total;
  scan_block(mine, total);
  return total;
}

__device__ inline void copy_block(const int32_t* from, int32_t* to, uint32_t count) {
#pragma unroll 1
  for (uint32_t first = threadIdx.x; first < count; first += kRowsPerThread * blockDim.x) {
    int32_t held[kRowsPerThread];
#pragma unroll
    for (int u = 0; u < kRowsPerThread; ++u) {
      const uint32_t i = first + u * blockDim.x;
      if (i < count) held[u] = from[i];
    }
#pragma unroll
    for (int u = 0; u < kRowsPerThread; ++u) {
      const uint32_t i = first + u * blockDim.x;
      if (i < count) to[i] = held[u];
    }
  }
}

// Plans the new positions: live rows first, in order, packed from token `start` on, followed by ids of -1 without
// tokens. `new_ids` may be `row_ids`, because rows only move down and the block reads a range before it writes it. The
// offsets must be another array.
__device__ inline void plan_rows(const int32_t* row_ids, const int32_t* offsets, int32_t* new_ids, int32_t* new_offsets,
                                 int32_t* source, uint32_t rows, int32_t start) {
  Counts done = 0;
#pragma unroll 1
  for (uint32_t range = 0; range < rows; range += kRowsPerThread * blockDim.x) {
    const uint32_t first = range + kRowsPerThread * threadIdx.x;
    int32_t ids[kRowsPerThread];
    int32_t lengths[kRowsPerThread];
    Counts mine = 0;
#pragma unroll
    for (int u = 0; u < kRowsPerThread; ++u) {
      const bool inside = first + u < rows;
      ids[u] = inside ? __ldcg(row_ids + first + u) : -1;
      lengths[u] = inside ? offsets[first + u + 1] - offsets[first + u] : 0;
    }
#pragma unroll
    for (int u = 0; u < kRowsPerThread; ++u) mine += ids[u] < 0 ? 0 : new_counts(1, lengths[u]);
    Counts total;
    Counts end = done + scan_block(mine, total) - mine;
#pragma unroll
    for (int u = 0; u < kRowsPerThread; ++u) {
      if (ids[u] < 0) continue;
      new_ids[rows_of(end)] = ids[u];
      source[rows_of(end)] = static_cast<int32_t>(first + u);
      end += new_counts(1, lengths[u]);
      new_offsets[rows_of(end)] = start + tokens_of(end);
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
