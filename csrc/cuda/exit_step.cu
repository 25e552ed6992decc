// The CUDA skeleton of exit_step and resident_exit: one block a row, whatever their number, and the last one to finish
// does what follows. It counts; in a loop that the host doesn't watch it also plans where the rows move, if that pays,
// and tells a graph whether to go on. One launch.

#include "../settle.h"
#include "exit_row.cuh"
#include "ticket.cuh"

namespace earlyexit {
namespace {

__device__ void set_condition(unsigned long long handle, bool value) {
#if CUDART_VERSION >= 12040
  if (handle != 0) cudaGraphSetConditional(handle, value);
#endif
}

// Plan where the rows go, to the other side of their buffer; returns the tokens present afterwards.
__device__ int32_t settle_rows(const Call& call, const After& after, Counts live) {
  const int32_t first = after.offsets[0];
  const int32_t present = after.offsets[call.rows] - first;
  if (!moving_pays(tokens_of(live), present, after.tile)) {
    for (int64_t j = threadIdx.x; j < call.rows; j += blockDim.x) after.source[j] = -1;
    return present;
  }
  for (int64_t j = threadIdx.x; j <= call.rows; j += blockDim.x) after.old_offsets[j] = after.offsets[j];
  __syncthreads();
  plan_rows(call.row_ids, after.old_offsets, call.row_ids, after.offsets, after.source, call.rows,
            first == 0 ? after.capacity : 0);
  return tokens_of(live);
}

template <class T>
__global__ void __launch_bounds__(kMeanThreads, kMeanBlocks)
    exit_step_kernel(const __grid_constant__ Call call, const __grid_constant__ Frame frame, int ticket,
                     const __grid_constant__ After after) {
  extern __shared__ __align__(16) float shared[];
  const bool invalid = step_row<T>(call, frame, blockIdx.x, memory_of_block(frame, shared));
  int32_t invalid_rows;
  if (!arrive(ticket, invalid, invalid_rows)) return;
  const Counts live = count_live(call.row_ids, call.offsets, call.rows);
  const bool settles = after.source != nullptr;
  const int32_t present = settles ? settle_rows(call, after, live) : 0;
  if (threadIdx.x > 0) return;
  after.counts[0] = rows_of(live);
  after.counts[1] = tokens_of(live);
  after.counts[2] = invalid_rows;
  if (settles) after.counts[3] = present;
  set_condition(after.handle, rows_of(live) > 0);
}

}  // namespace

void launch_exit_step(const Call& call, const Frame& frame, Dtype dtype, int ticket, const After& after,
                      cudaStream_t stream) {
  with_type(dtype, [&](auto type) {
    exit_step_kernel<decltype(type)>
        <<<call.rows, frame.threads, shared_bytes(frame), stream>>>(call, frame, ticket, after);
  });
}

}  // namespace earlyexit
