// exit_step on CUDA: the last block counts the live rows.

#include "exit_row.cuh"

namespace earlyexit {
namespace {

struct CountRows {
  int32_t* counts;

  __device__ void operator()(const Call&, Counts live, int32_t invalid_rows) const {
    if (threadIdx.x > 0) return;
    counts[0] = rows_of(live);
    counts[1] = tokens_of(live);
    counts[2] = invalid_rows;
  }
};

}  // namespace

void launch_exit_step(const Call& call, const Frame& frame, Dtype dtype, int32_t* counts, cudaStream_t stream) {
  launch_rows(call, frame, dtype, counts, CountRows{counts}, stream);
}

}  // namespace earlyexit
