// Compaction on CUDA: `compact` is a scan by one block, `gather_rows` copies the live rows.

#include "block.cuh"
#include "kernels.h"

namespace earlyexit {
namespace {

constexpr int kScanThreads = 1024;
constexpr int kCopyThreads = 256;
constexpr int kInFlight = 4;
// Maximum number of blocks; some of them may have nothing to copy.
constexpr int64_t kCopyBlocks = 4096;

__global__ void __launch_bounds__(kScanThreads)
    compact_kernel(const int32_t* row_ids, const int32_t* offsets, int32_t* new_ids, int32_t* new_offsets,
                   int32_t* source, int64_t rows) {
  plan_rows(row_ids, offsets, new_ids, new_offsets, source, rows, 0);
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
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (w + u * step < words) held[u] = from[w + u * step];
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
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

void launch_compact(const int32_t* row_ids, const int32_t* offsets, int32_t* new_ids, int32_t* new_offsets,
                    int32_t* source, int64_t rows, cudaStream_t stream) {
  compact_kernel<<<1, kScanThreads, 0, stream>>>(row_ids, offsets, new_ids, new_offsets, source, rows);
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
