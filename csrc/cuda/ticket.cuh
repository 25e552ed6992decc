// Finds the block of a launch that finishes last; it sees the writes of all others and can continue without a second
// launch.
#pragma once

#include "block.cuh"

namespace earlyexit {
namespace {

// Adds to a counter on the device. Release: earlier writes of the block become visible before it. Acquire: writes of
// blocks that added earlier are visible afterwards. __threadfence on both sides would order more and be slower.
__device__ inline Counts add_in_order(Counts* count, Counts value) {
  Counts before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(__cvta_generic_to_global(count)), "l"(value)
               : "memory");
  return before;
}

// Returns whether this is the last block; if so, `invalid_rows` is the total of all blocks. The ticket is 0 before the
// launch, and again after it: its lower half counts arrivals, its upper half their invalid rows. The arguments of
// thread 0 count.
__device__ inline bool arrive(Counts* ticket, bool invalid, int32_t& invalid_rows) {
  __shared__ Counts before;
  // the last block may rewrite row ids, so all threads of this one must have read theirs
  __syncthreads();
  if (threadIdx.x == 0) before = add_in_order(ticket, new_counts(invalid, 1));
  __syncthreads();
  if (tokens_of(before) != static_cast<int32_t>(gridDim.x) - 1) return false;
  invalid_rows = rows_of(before) + invalid;
  if (threadIdx.x == 0) *ticket = 0;
  return true;
}

}  // namespace
}  // namespace earlyexit
