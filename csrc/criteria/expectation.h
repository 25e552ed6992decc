// Expectation: never leave early; answer log sum_l w_l softmax(z_l), with w_l = lambda_l prod_{j < l} (1 - lambda_j)
// for l < L and the remainder for l = L. With one output: sum_l w_l z_l.
// PALBERT: Teaching ALBERT to Ponder. Nikita Balagansky, Daniil Gavrilov. NeurIPS 2022, arXiv 2204.03276.
// State: the product so far, initially 1; then the sum of each class, initially 0.
#pragma once

#include "../row.h"

namespace earlyexit {

struct Expectation {
  static constexpr bool needs_aux = true;  // lambda_l in [0, 1]
  static constexpr int param_count = 0;
  static constexpr int state_width = 1;
  static constexpr int state_per_class = 1;

  static EE_HD bool step(const Row& row) {
    float& survival = row.state[0];
    const bool last = row.layer == row.depth;
    const bool one_output = row.classes == 1;
    const float weight = last ? survival : survival * row.aux;
    const float top = row.z[top_class(row)];
    const float sum = softmax_sum(row, top);
    EE_ROLLED for (int c = 0; c < row.classes; ++c) {
      float& mean = row.state[(1 + c) * row.stride];
      if (weight > 0.0f) mean += weight * (one_output ? row.z[c] : expf(below_top(row.z[c], top)) / sum);
      if (last) row.answer[c] = one_output ? mean : safe_log(mean);
    }
    survival *= 1.0f - row.aux;
    return false;
  }
};

}  // namespace earlyexit
