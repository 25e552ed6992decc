// Which block of a launch finishes last: it sees what all the others wrote, and does what has to follow, in one launch.
#pragma once

#include "block.cuh"
#include "kernels.h"

namespace earlyexit {
namespace {

// Zero when the module is loaded, on each device, and again at the end of each launch: never to be cleared. ops.cpp says
// which one a launch takes. Arrivals stand in the lower half, their invalid rows in the upper.
__device__ Counts tickets[kTickets];

// Add to a count of the device. Released: what the block wrote comes before it. Acquired: what blocks that added earlier
// wrote comes before what is read from here on. A __threadfence on either side would order more than that, and slower.
__device__ inline Counts add_in_order(Counts* count, Counts value) {
  Counts before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(__cvta_generic_to_global(count)), "l"(value)
               : "memory");
  return before;
}

// Whether this is the last block; if so, `invalid_rows` is what all of them reported. Thread 0's words count.
__device__ inline bool arrive(int ticket, bool invalid, int32_t& invalid_rows) {
  __shared__ Counts before;
  // the last block may rewrite row ids: no thread of this one may still have its own to read
  __syncthreads();
  if (threadIdx.x == 0) before = add_in_order(&tickets[ticket], new_counts(invalid, 1));
  __syncthreads();
  if (tokens_of(before) != static_cast<int32_t>(gridDim.x) - 1) return false;
  invalid_rows = rows_of(before) + invalid;
  if (threadIdx.x == 0) tickets[ticket] = 0;
  return true;
}

}  // namespace
}  // namespace earlyexit
