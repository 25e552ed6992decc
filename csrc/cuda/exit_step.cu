// exit_step on CUDA: the last block writes the counts.

#include "exit_row.cuh"

namespace earlyexit {
namespace {

struct CountRows {
  int32_t* counts;

  struct Seen {};

  __device__ Seen read(const Call&) const { return {}; }

  __device__ void operator()(const Call&, Seen, const Totals& all) const {
    if (threadIdx.x > 0) return;
    counts[0] = rows_of(all.live);
    counts[1] = tokens_of(all.live);
    counts[2] = all.invalid;
  }
};

}  // namespace

void launch_exit_step(const Call& call, const Frame& frame, Dtype dtype, int32_t* counts, cudaStream_t stream) {
  launch_rows(call, frame, dtype, counts, CountRows{counts}, stream);
}

}  // namespace earlyexit
