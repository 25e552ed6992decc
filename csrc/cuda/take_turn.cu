// Selects the case of a loop in a conditional graph, and whether another turn follows.

#include "kernels.h"

namespace earlyexit {
namespace {

__global__ void take_turn_kernel(int32_t* turn, unsigned long long chosen, unsigned long long again, int32_t turns) {
#if CUDART_VERSION >= 12040
  if (threadIdx.x > 0) return;
  const int32_t now = (*turn)++;
  cudaGraphSetConditional(chosen, now);
  cudaGraphSetConditional(again, now + 1 < turns);
#endif
}

}  // namespace

void launch_take_turn(int32_t* turn, unsigned long long chosen, unsigned long long again, int32_t turns,
                      cudaStream_t stream) {
  take_turn_kernel<<<1, 32, 0, stream>>>(turn, chosen, again, turns);
}

}  // namespace earlyexit
