// Energy: leave if sigmoid(E) = 1 / (1 + sum_c exp(z_c)) < threshold, E = -log sum_c exp(z_c).
// COSEE: Consistency-Oriented Signal-Based Early Exiting via Calibrated Sample Weighting Mechanism. Jianing He et al.
// AAAI 2025, arXiv 2412.13236.
#pragma once

#include "../row.h"

namespace earlyexit {

struct Energy {
  static constexpr bool needs_aux = false;
  static constexpr int param_count = 1;  // threshold
  static constexpr int state_width = 0;
  static constexpr int state_per_class = 0;

  static EE_HD bool step(const Row& row) {
    const float top = row.z[top_class(row)];
    return 1.0f / (1.0f + softmax_sum(row, top) * expf(top)) < row.params[0];
  }
};

}  // namespace earlyexit
