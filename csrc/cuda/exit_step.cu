// The CUDA skeleton of exit_step: one block a row, and the last one to finish counts. One launch for any batch.

#include "exit_row.cuh"
#include "ticket.cuh"

namespace earlyexit {
namespace {

template <class T>
__global__ void __launch_bounds__(kMeanThreads, kMeanBlocks)
    exit_step_kernel(const __grid_constant__ Call call, const __grid_constant__ Frame frame, int ticket, int32_t* counts) {
  extern __shared__ __align__(16) float shared[];
  const bool invalid = step_row<T>(call, frame, blockIdx.x, memory_of_block(frame, shared));
  int32_t invalid_rows;
  if (!arrive(ticket, invalid, invalid_rows)) return;
  const Counts live = count_live(call.row_ids, call.offsets, call.rows);
  if (threadIdx.x > 0) return;
  counts[0] = rows_of(live);
  counts[1] = tokens_of(live);
  counts[2] = invalid_rows;
}

}  // namespace

void launch_exit_step(const Call& call, const Frame& frame, Dtype dtype, int ticket, int32_t* counts,
                      cudaStream_t stream) {
  with_type(dtype, [&](auto type) {
    exit_step_kernel<decltype(type)><<<call.rows, frame.threads, shared_bytes(frame), stream>>>(call, frame, ticket, counts);
  });
}

}  // namespace earlyexit
