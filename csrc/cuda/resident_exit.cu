// An exit in a loop that the host doesn't watch: exit_step, and in the same launch what follows it. The last block to
// finish plans where the rows move, if that pays, and tells a graph whether the loop goes on.

#include "../settle.h"
#include "exit_row.cuh"
#include "ticket.cuh"

namespace earlyexit {
namespace {

__device__ void go_on(unsigned long long handle, bool wanted) {
#if CUDART_VERSION >= 12040
  if (handle != 0) cudaGraphSetConditional(handle, wanted);
#endif
}

// By one block, once all rows have decided.
__device__ void settle_rows(const Call& call, const Settle& settle, int32_t invalid_rows) {
  const Counts live = count_live(call.row_ids, settle.offsets, call.rows);
  const int32_t first = settle.offsets[0];
  const int32_t present = settle.offsets[call.rows] - first;
  const bool moves = moving_pays(tokens_of(live), present, settle.tile);
  if (moves) {
    for (int64_t j = threadIdx.x; j <= call.rows; j += blockDim.x) settle.old_offsets[j] = settle.offsets[j];
    __syncthreads();
    plan_rows(call.row_ids, settle.old_offsets, call.row_ids, settle.offsets, settle.source, call.rows,
              first == 0 ? settle.capacity : 0);
  } else {
    for (int64_t j = threadIdx.x; j < call.rows; j += blockDim.x) settle.source[j] = -1;
  }
  if (threadIdx.x > 0) return;
  settle.counts[0] = rows_of(live);
  settle.counts[1] = tokens_of(live);
  settle.counts[2] = invalid_rows;
  settle.counts[3] = moves ? tokens_of(live) : present;
  go_on(settle.handle, rows_of(live) > 0);
}

template <class T>
__global__ void __launch_bounds__(kMeanThreads, kMeanBlocks)
    resident_exit_kernel(const __grid_constant__ Call call, const __grid_constant__ Frame frame, int ticket,
                         const __grid_constant__ Settle settle) {
  extern __shared__ __align__(16) float shared[];
  const bool invalid = step_row<T>(call, frame, blockIdx.x, memory_of_block(frame, shared));
  int32_t invalid_rows;
  if (arrive(ticket, invalid, invalid_rows)) settle_rows(call, settle, invalid_rows);
}

}  // namespace

void launch_resident_exit(const Call& call, const Frame& frame, Dtype dtype, int ticket, const Settle& settle,
                          cudaStream_t stream) {
  with_type(dtype, [&](auto type) {
    resident_exit_kernel<decltype(type)>
        <<<call.rows, frame.threads, shared_bytes(frame), stream>>>(call, frame, ticket, settle);
  });
}

}  // namespace earlyexit
