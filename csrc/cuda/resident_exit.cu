// resident_exit: an exit of the device-resident loop. The last block plans the compaction, if it pays, and sets the
// condition for the graph to continue. A separate file, because older drivers do not support that call.

#include "exit_row.cuh"

namespace earlyexit {
namespace {

// Returns whether compaction to the live tokens saves at least one tile per layer: whether the tiles of the live tokens
// cover less than the present ones. All are less than 2^30.
__device__ bool moving_pays(uint32_t live, uint32_t present, const Divisor& tile) {
  return tile.divide(live + tile.by - 1) * tile.by < present;
}

// Plans the move of the live rows to the other side.
__device__ void plan_move(const Call& call, const Settle& to, int32_t first) {
  copy_block(to.offsets, to.old_offsets, call.rows + 1);
  __syncthreads();
  plan_rows(call.row_ids, to.old_offsets, call.row_ids, to.offsets, to.source, call.rows, first == 0 ? to.capacity : 0);
}

struct SettleRows {
  Settle to;

  struct Seen {
    int32_t first;
    int32_t end;
  };

  __device__ Seen read(const Call& call) const { return {to.offsets[0], to.offsets[call.rows]}; }

  __device__ void operator()(const Call& call, Seen seen, const Totals& all) const {
    int32_t present = seen.end - seen.first;
    if (moving_pays(tokens_of(all.live), present, to.tile)) {
      plan_move(call, to, seen.first);
      present = tokens_of(all.live);
    } else {
#pragma unroll 1
      for (uint32_t j = threadIdx.x; j < static_cast<uint32_t>(call.rows); j += blockDim.x) to.source[j] = -1;
    }
    if (threadIdx.x > 0) return;
    to.counts[0] = rows_of(all.live);
    to.counts[1] = tokens_of(all.live);
    to.counts[2] = all.invalid;
    to.counts[3] = present;
#if CUDART_VERSION >= 12040
    if (to.sets_handle) cudaGraphSetConditional(to.handle, rows_of(all.live) > 0);
#endif
  }
};

}  // namespace

void launch_resident_exit(const Call& call, const Frame& frame, Dtype dtype, const Settle& settle,
                          cudaStream_t stream) {
  launch_rows(call, frame, dtype, settle.counts, SettleRows{settle}, stream);
}

}  // namespace earlyexit
