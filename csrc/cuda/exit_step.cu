// exit_step on CUDA.

#include "exit_row.cuh"

namespace earlyexit {

void launch_exit_step(const Call& call, const Frame& frame, Dtype dtype, int32_t* counts, cudaStream_t stream) {
  const int64_t shared_bytes = frame.shared_bytes();
  with_type(dtype, [&](auto type) {
    with_rule(call.rule, [&](auto rule) {
      const auto kernel = exit_kernel<decltype(type), decltype(rule)>;
      kernel<<<call.rows, frame.threads, shared_bytes, stream>>>(call, frame, counts);
    });
  });
}

}  // namespace earlyexit
