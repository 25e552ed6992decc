// Q-exit: with halting probabilities lambda_l, leave if 1 - prod_{j <= l} (1 - lambda_j) > q, or if q <= 0.
// PALBERT: Teaching ALBERT to Ponder. Nikita Balagansky, Daniil Gavrilov. NeurIPS 2022, arXiv 2204.03276.
// State: the product so far, i.e. the probability of not having halted, initially 1.
#pragma once

#include "../row.h"

namespace earlyexit {

struct QExit {
  static constexpr bool needs_aux = true;  // lambda_l in [0, 1]
  static constexpr int param_count = 1;    // q
  static constexpr int state_width = 1;
  static constexpr int state_per_class = 0;

  static EE_HD bool step(const Row& row) {
    float& survival = row.state[0];
    survival *= 1.0f - row.aux;
    const float q = row.params[0];
    return 1.0f - survival > q || q <= 0.0f;
  }
};

}  // namespace earlyexit
