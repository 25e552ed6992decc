// resident_exit: an exit in a loop that the host doesn't watch. The last block plans where the rows move, if that pays, and
// tells a graph whether to go on. A file of its own, since the call for that is one that a driver may not know.

#include "../settle.h"
#include "exit_row.cuh"

namespace earlyexit {
namespace {

struct SettleRows {
  Settle to;

  __device__ void operator()(const Call& call, Counts live, int32_t invalid_rows) const {
    const int32_t first = to.offsets[0];
    int32_t present = to.offsets[call.rows] - first;
    if (moving_pays(tokens_of(live), present, to.tile)) {
      for (int64_t j = threadIdx.x; j <= call.rows; j += blockDim.x) to.old_offsets[j] = to.offsets[j];
      __syncthreads();
      plan_rows(call.row_ids, to.old_offsets, call.row_ids, to.offsets, to.source, call.rows,
                first == 0 ? to.capacity : 0);
      present = tokens_of(live);
    } else {
      for (int64_t j = threadIdx.x; j < call.rows; j += blockDim.x) to.source[j] = -1;
    }
    if (threadIdx.x > 0) return;
    to.counts[0] = rows_of(live);
    to.counts[1] = tokens_of(live);
    to.counts[2] = invalid_rows;
    to.counts[3] = present;
#if CUDART_VERSION >= 12040
    if (to.handle != 0) cudaGraphSetConditional(to.handle, rows_of(live) > 0);
#endif
  }
};

}  // namespace

void launch_resident_exit(const Call& call, const Frame& frame, Dtype dtype, int ticket, const Settle& settle,
                          cudaStream_t stream) {
  launch_rows(call, frame, dtype, ticket, SettleRows{settle}, stream);
}

}  // namespace earlyexit
