// Patience: leave after `patience` consecutive exits that agree with the previous one.
// BERT Loses Patience: Fast and Robust Inference with Early Exit. Wangchunshu Zhou et al. NeurIPS 2020, arXiv
// 2006.04152 (PABEE). Labels agree if they are equal; a regression output (C = 1, tolerance >= 0) agrees if it
// changed by less than the tolerance.
// State: the last label or output, initially NaN, with which nothing agrees; and the number of consecutive agreements.
#pragma once

#include "../row.h"

namespace earlyexit {

struct Patience {
  static constexpr bool needs_aux = false;
  static constexpr int param_count = 2;  // patience, tolerance (negative: compare labels)
  static constexpr int state_width = 2;
  static constexpr int state_per_class = 0;

  static EE_HD bool step(const Row& row) {
    float& last = row.state[0];
    float& agreements = row.state[row.stride];
    const float tolerance = row.params[1];
    const bool labels = tolerance < 0.0f;
    const float now = labels ? static_cast<float>(top_class(row)) : row.z[0];
    const bool agrees = labels ? now == last : fabsf(now - last) < tolerance;
    agreements = agrees ? agreements + 1.0f : 0.0f;
    last = now;
    return agreements >= row.params[0];
  }
};

}  // namespace earlyexit
