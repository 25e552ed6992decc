// What the threads of a block do together: counts of rows and tokens, and the plan of a compaction.
#pragma once

#include <cstdint>

namespace earlyexit {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

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

// Rows i with an id, and their tokens: one a row without offsets. Read past the first cache, which other blocks' writes
// don't reach.
__device__ inline Counts counts_of_row(const int32_t* row_ids, const int32_t* offsets, int64_t i) {
  if (__ldcg(row_ids + i) < 0) return 0;
  return new_counts(1, offsets == nullptr ? 1 : offsets[i + 1] - offsets[i]);
}

// The live rows of a batch and their tokens, to every thread of the block.
__device__ inline Counts count_live(const int32_t* row_ids, const int32_t* offsets, int64_t rows) {
  Counts mine = 0;
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) mine += counts_of_row(row_ids, offsets, i);
  Counts total;
  scan_block(mine, total);
  return total;
}

// Where the rows go: the live ones first, in order, back to back from token `start` on; -1 and no tokens after them.
// `new_ids` may be `row_ids`: a row moves down or stays, and every block-wide step reads before it writes. The offsets
// have to be another array.
__device__ inline void plan_rows(const int32_t* row_ids, const int32_t* offsets, int32_t* new_ids, int32_t* new_offsets,
                                 int32_t* source, int64_t rows, int32_t start) {
  Counts done = 0;
  for (int64_t first = 0; first < rows; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    const int32_t n = i < rows ? __ldcg(row_ids + i) : -1;
    Counts total;
    const Counts end = done + scan_block(n < 0 ? 0 : new_counts(1, offsets[i + 1] - offsets[i]), total);
    if (n >= 0) {
      const int32_t slot = rows_of(end) - 1;
      new_ids[slot] = n;
      source[slot] = static_cast<int32_t>(i);
      new_offsets[slot + 1] = start + tokens_of(end);
    }
    done += total;
  }
  if (threadIdx.x == 0) new_offsets[0] = start;
  for (int64_t j = rows_of(done) + threadIdx.x; j < rows; j += blockDim.x) {
    new_ids[j] = -1;
    source[j] = -1;
    new_offsets[j + 1] = start + tokens_of(done);
  }
}

}  // namespace earlyexit
