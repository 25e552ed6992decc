// Margin: leave if p_top1 - p_top2 >= threshold, p = softmax z.
// Confident Adaptive Language Modeling. Tal Schuster et al. NeurIPS 2022, arXiv 2207.07061 ("softmax response").
// With s = sum_c exp(z_c - max z) the margin is (1 - exp(second - max z)) / s; a tie at the top gives 0.
#pragma once

#include "../row.h"

namespace earlyexit {

struct Margin {
  static constexpr bool needs_aux = false;
  static constexpr int param_count = 1;  // threshold
  static constexpr int state_width = 0;
  static constexpr int state_per_class = 0;

  static EE_HD bool step(const Row& row) {
    const int best = top_class(row);
    const float top = row.z[best];
    float second = -INFINITY;
    EE_ROLLED for (int c = 0; c < row.classes; ++c) {
      if (c != best && row.z[c] > second) second = row.z[c];
    }
    return (1.0f - expf(below_top(second, top))) / softmax_sum(row, top) >= row.params[0];
  }
};

}  // namespace earlyexit
