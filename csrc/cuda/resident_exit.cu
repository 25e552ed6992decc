// resident_exit: an exit of the device-resident loop. The last block plans the compaction, if it pays, and sets the
// condition for the graph to continue. A separate file, because older drivers do not support that call.

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
      copy_block(to.offsets, to.old_offsets, call.rows + 1);
      __syncthreads();
      plan_rows(call.row_ids, to.old_offsets, call.row_ids, to.offsets, to.source, call.rows,
                first == 0 ? to.capacity : 0);
      present = tokens_of(live);
    } else {
#pragma unroll 1
      for (int64_t j = threadIdx.x; j < call.rows; j += blockDim.x) to.source[j] = -1;
    }
    if (threadIdx.x > 0) return;
    to.counts[0] = rows_of(live);
    to.counts[1] = tokens_of(live);
    to.counts[2] = invalid_rows;
    to.counts[3] = present;
#if CUDART_VERSION >= 12040
    if (to.sets_handle) cudaGraphSetConditional(to.handle, rows_of(live) > 0);
#endif
  }
};

}  // namespace

void launch_resident_exit(const Call& call, const Frame& frame, Dtype dtype, const Settle& settle,
                          cudaStream_t stream) {
  launch_rows(call, frame, dtype, settle.counts, SettleRows{settle}, stream);
}

}  // namespace earlyexit
