// Which block of a launch finishes last: it sees what all the others wrote, and does what has to follow, in one launch.
#pragma once

#include "block.cuh"
#include "kernels.h"

namespace earlyexit {
namespace {

// Zero when the module is loaded, on each device, and again at the end of each launch: never to be cleared. `ticket_of`
// says which one a launch takes. Arrivals stand in the lower half, their invalid rows in the upper.
__device__ unsigned long long tickets[kTickets];

// Whether this is the last block; if so `invalid_rows` is what all of them reported (thread 0's word counts).
__device__ inline bool arrive(int ticket, bool invalid, int32_t& invalid_rows) {
  __shared__ unsigned long long before;
  // The last block may rewrite row ids: no thread of this one may still have its own to read.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // this block's writes come before its arrival
    before = atomicAdd(&tickets[ticket], new_counts(invalid, 1));
    __threadfence();  // and the others' before what is read from here on
  }
  __syncthreads();
  if (tokens_of(before) != static_cast<int32_t>(gridDim.x) - 1) return false;
  invalid_rows = rows_of(before) + invalid;
  if (threadIdx.x == 0) tickets[ticket] = 0;
  return true;
}

}  // namespace
}  // namespace earlyexit
