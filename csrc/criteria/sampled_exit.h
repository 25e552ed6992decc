// Sampled exit: leave if 1 - prod_{j <= l} (1 - lambda_j) > u, u uniform in [0, 1): a draw from the exit distribution.
// PonderNet: Learning to Ponder. Andrea Banino, Jan Balaguer, Charles Blundell. arXiv 2107.05407.
// State: the product so far, initially 1; the row's u, written by the host only.
#pragma once

#include "../row.h"

namespace earlyexit {

struct SampledExit {
  static constexpr bool needs_aux = true;  // lambda_l in [0, 1]
  static constexpr int param_count = 0;
  static constexpr int state_width = 2;
  static constexpr int state_per_class = 0;

  static EE_HD bool step(const Row& row) {
    float& survival = row.state[0];
    survival *= 1.0f - row.aux;
    return 1.0f - survival > row.state[row.stride];
  }
};

}  // namespace earlyexit
