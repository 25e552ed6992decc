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

// Live rows with their tokens, and rows with invalid logits, of a block or of a launch.
struct Totals {
  Counts live;
  int32_t invalid;
};

// Returns whether this is the last block; if so, `all` are the totals of the launch. The two tickets are 0 before the
// launch and again after it: the first counts arrivals in its lower half and invalid rows in its upper half, the second
// live rows. The totals of thread 0 count. A launch of one block needs no tickets.
__device__ inline bool arrive(Counts* tickets, const Totals& own, Totals& all) {
  __shared__ Totals totals;
  __shared__ bool last;
  // the last block may rewrite row ids, so all threads of this one must have read theirs
  __syncthreads();
  if (threadIdx.x == 0) {
    totals = own;
    last = true;
    if (gridDim.x > 1) {
      if (own.live != 0) atomicAdd(tickets + 1, own.live);
      const Counts before = add_in_order(tickets, new_counts(own.invalid, 1));
      last = tokens_of(before) == static_cast<int32_t>(gridDim.x) - 1;
      if (last) {
        totals = {__ldcg(tickets + 1), rows_of(before) + own.invalid};
        tickets[0] = tickets[1] = 0;
      }
    }
  }
  __syncthreads();
  all = totals;
  return last;
}

}  // namespace
}  // namespace earlyexit
