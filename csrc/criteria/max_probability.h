// Maximum probability: leave if max_c p_c >= threshold, p = softmax z.
// Confident Adaptive Language Modeling. Tal Schuster et al. NeurIPS 2022, arXiv 2207.07061.
// The top class has exp(z - max z) = 1, so its probability is 1 / sum_c exp(z_c - max z).
#pragma once

#include "../row.h"

namespace earlyexit {

struct MaxProbability {
  static constexpr bool needs_aux = false;
  static constexpr int param_count = 1;  // threshold
  static constexpr int state_width = 0;
  static constexpr int state_per_class = 0;

  static EE_HD bool step(const Row& row) {
    const float top = row.z[top_class(row)];
    return 1.0f / softmax_sum(row, top) >= row.params[0];
  }
};

}  // namespace earlyexit
