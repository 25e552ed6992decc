// Compaction on CUDA: `compact` is a scan by one block, `gather_rows` copies the live rows.

#include "kernels.h"

namespace earlyexit {
namespace {

constexpr int kScanThreads = 1024;
constexpr int kCopyThreads = 256;
constexpr int kInFlight = 4;
// Maximum number of blocks; some of them may have nothing to copy.
constexpr int64_t kCopyBlocks = 4096;

// Two counts packed into one number, so that one sum adds both: rows in the upper half, tokens in the lower.
using Counts = unsigned long long;

__device__ Counts new_counts(int32_t rows, int32_t tokens) {
  return static_cast<Counts>(rows) << 32 | static_cast<Counts>(tokens);
}
__device__ int32_t rows_of(Counts counts) { return static_cast<int32_t>(counts >> 32); }
__device__ int32_t tokens_of(Counts counts) { return static_cast<int32_t>(counts & 0xffffffffu); }

// Returns the inclusive prefix sum of `mine`; `total` is the sum of the block. All threads must call it, in whole
// warps.
__device__ Counts scan_block(Counts mine, Counts& total) {
  __shared__ Counts sums[kWarp];
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  EE_ROLLED for (int step = 1; step < kWarp; step *= 2) {
    const Counts left = __shfl_up_sync(kAllLanes, mine, step);
    if (lane >= step) mine += left;
  }
  if (lane == kWarp - 1) sums[warp] = mine;
  __syncthreads();
  total = 0;
  Counts before = 0;
  EE_ROLLED for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    if (w == warp) before = total;
    total += sums[w];
  }
  __syncthreads();  // before the next scan writes `sums`
  return before + mine;
}

// Plans the new positions: live rows first, in order, followed by ids of -1 without tokens.
__global__ void __launch_bounds__(kScanThreads)
    compact_kernel(const __grid_constant__ Compaction c) {
  Counts done = 0;
  EE_ROLLED for (uint32_t range = 0; range < c.rows; range += blockDim.x) {
    const uint32_t i = range + threadIdx.x;
    const int32_t id = i < c.rows ? c.row_ids[i] : -1;
    const int32_t tokens = id < 0 ? 0 : c.offsets[i + 1] - c.offsets[i];
    const Counts mine = id < 0 ? 0 : new_counts(1, tokens);
    Counts total;
    const Counts end = done + scan_block(mine, total);
    if (id >= 0) {
      const int32_t to = rows_of(end) - 1;
      c.new_ids[to] = id;
      c.source[to] = static_cast<int32_t>(i);
      c.new_offsets[to + 1] = tokens_of(end);
    }
    done += total;
  }
  if (threadIdx.x == 0) c.new_offsets[0] = 0;
  EE_ROLLED for (uint32_t j = rows_of(done) + threadIdx.x; j < c.rows; j += blockDim.x) {
    c.new_ids[j] = -1;
    c.source[j] = -1;
    c.new_offsets[j + 1] = tokens_of(done);
  }
}

// Blocks (j, 0 .. gridDim.y) copy the contiguous tokens of new row j, in words of word_t.
template <class word_t>
__global__ void __launch_bounds__(kCopyThreads) gather_rows_kernel(const __grid_constant__ Gather gather) {
  const int64_t j = blockIdx.x;
  const int64_t i = gather.source[j];
  if (i < 0) return;
  const int64_t token = gather.token_bytes / sizeof(word_t);
  const int64_t first = gather.offsets[i];
  const int64_t words = (gather.offsets[i + 1] - first) * token;
  const word_t* from = static_cast<const word_t*>(gather.hidden) + first * token;
  word_t* to = static_cast<word_t*>(gather.out) + gather.new_offsets[j] * token;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x;
  for (int64_t w = blockIdx.y * blockDim.x + threadIdx.x; w < words; w += kInFlight * step) {
    word_t held[kInFlight];
    EE_UNROLLED for (int u = 0; u < kInFlight; ++u) {
      if (w + u * step < words) held[u] = from[w + u * step];
    }
    EE_UNROLLED for (int u = 0; u < kInFlight; ++u) {
      if (w + u * step < words) to[w + u * step] = held[u];
    }
  }
}

template <class word_t>
void launch_gather(const Gather& gather, cudaStream_t stream) {
  // from the capacity: the number of live tokens is known on the device only
  const int64_t per_block = static_cast<int64_t>(sizeof(word_t)) * kInFlight * kCopyThreads;
  const int64_t wanted = gather.tokens * gather.token_bytes / (gather.rows * per_block) + 1;
  const int64_t max_blocks = kCopyBlocks / gather.rows + 1;
  const dim3 grid(gather.rows, wanted < max_blocks ? wanted : max_blocks);
  gather_rows_kernel<word_t><<<grid, kCopyThreads, 0, stream>>>(gather);
}

}  // namespace

void launch_compact(const Compaction& compaction, cudaStream_t stream) {
  compact_kernel<<<1, kScanThreads, 0, stream>>>(compaction);
}

void launch_gather_rows(const Gather& gather, cudaStream_t stream) {
  const uintptr_t every = reinterpret_cast<uintptr_t>(gather.hidden) | reinterpret_cast<uintptr_t>(gather.out) |
                          static_cast<uintptr_t>(gather.token_bytes);
  if (every % sizeof(uint4) == 0) return launch_gather<uint4>(gather, stream);
  if (every % sizeof(uint2) == 0) return launch_gather<uint2>(gather, stream);
  if (every % sizeof(uint32_t) == 0) return launch_gather<uint32_t>(gather, stream);
  launch_gather<uint16_t>(gather, stream);
}

}  // namespace earlyexit
