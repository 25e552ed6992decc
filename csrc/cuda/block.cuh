// What the threads of a block do together: counts of rows and tokens, and the plan of a compaction.
#pragma once

#include <cstdint>

namespace earlyexit {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// Rows that a thread has loads under way for at a time: one block does these jobs, so latency is all they cost.
constexpr int kRowsAThread = 8;

// Two counts in one number, so that one sum adds both: rows in the upper half, tokens in the lower.
using Counts = unsigned long long;

__device__ inline Counts new_counts(int32_t rows, int32_t tokens) {
  return static_cast<Counts>(rows) << 32 | static_cast<Counts>(tokens);
}
__device__ inline int32_t rows_of(Counts counts) { return static_cast<int32_t>(counts >> 32); }
__device__ inline int32_t tokens_of(Counts counts) { return static_cast<int32_t>(counts & 0xffffffffu); }

// The sum of `mine` up to and with this thread; `total` is the block's. For whole warps, and every thread of the block.
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
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    if (w == warp) before = total;
    total += sums[w];
  }
  __syncthreads();  // the next scan writes `sums` again
  return before + mine;
}

// The live rows of a batch and their tokens, one a row without offsets; to every thread of the block. Ids are read past
// the first cache, which other blocks' writes don't reach.
__device__ inline Counts count_live(const int32_t* row_ids, const int32_t* offsets, uint32_t rows) {
  Counts mine = 0;
  for (uint32_t first = threadIdx.x; first < rows; first += kRowsAThread * blockDim.x) {
    Counts row[kRowsAThread];
#pragma unroll
    for (int u = 0; u < kRowsAThread; ++u) {
      const uint32_t i = first + u * blockDim.x;
      const int32_t n = i < rows ? __ldcg(row_ids + i) : -1;
      const int32_t tokens = i < rows && offsets != nullptr ? offsets[i + 1] - offsets[i] : 1;
      row[u] = n < 0 ? 0 : new_counts(1, tokens);
    }
#pragma unroll
    for (int u = 0; u < kRowsAThread; ++u) mine += row[u];
  }
  Counts total;
  scan_block(mine, total);
  return total;
}

__device__ inline void copy_block(const int32_t* from, int32_t* to, uint32_t count) {
  for (uint32_t first = threadIdx.x; first < count; first += kRowsAThread * blockDim.x) {
    int32_t held[kRowsAThread];
#pragma unroll
    for (int u = 0; u < kRowsAThread; ++u) {
      const uint32_t i = first + u * blockDim.x;
      if (i < count) held[u] = from[i];
    }
#pragma unroll
    for (int u = 0; u < kRowsAThread; ++u) {
      const uint32_t i = first + u * blockDim.x;
      if (i < count) to[i] = held[u];
    }
  }
}

// Where the rows go: the live ones first, in order, back to back from token `start` on; -1 and no tokens after them.
// `new_ids` may be `row_ids`: a row moves down or stays, and the block reads a stretch before it writes it. The offsets
// have to be another array.
__device__ inline void plan_rows(const int32_t* row_ids, const int32_t* offsets, int32_t* new_ids, int32_t* new_offsets,
                                 int32_t* source, uint32_t rows, int32_t start) {
  Counts done = 0;
  for (uint32_t stretch = 0; stretch < rows; stretch += kRowsAThread * blockDim.x) {
    const uint32_t first = stretch + kRowsAThread * threadIdx.x;
    int32_t ids[kRowsAThread];
    int32_t lengths[kRowsAThread];
    Counts mine = 0;
#pragma unroll
    for (int u = 0; u < kRowsAThread; ++u) {
      const bool inside = first + u < rows;
      ids[u] = inside ? __ldcg(row_ids + first + u) : -1;
      lengths[u] = inside ? offsets[first + u + 1] - offsets[first + u] : 0;
    }
#pragma unroll
    for (int u = 0; u < kRowsAThread; ++u) mine += ids[u] < 0 ? 0 : new_counts(1, lengths[u]);
    Counts total;
    Counts end = done + scan_block(mine, total) - mine;
#pragma unroll
    for (int u = 0; u < kRowsAThread; ++u) {
      if (ids[u] < 0) continue;
      new_ids[rows_of(end)] = ids[u];
      source[rows_of(end)] = static_cast<int32_t>(first + u);
      end += new_counts(1, lengths[u]);
      new_offsets[rows_of(end)] = start + tokens_of(end);
    }
    done += total;
  }
  if (threadIdx.x == 0) new_offsets[0] = start;
  for (uint32_t j = rows_of(done) + threadIdx.x; j < rows; j += blockDim.x) {
    new_ids[j] = -1;
    source[j] = -1;
    new_offsets[j + 1] = start + tokens_of(done);
  }
}

}  // namespace earlyexit
