// Divergence patience: leave after `patience` consecutive exits with JS(p_l, p_{l-1}) < threshold, the Jensen-Shannon
// divergence in nats: half the sum over c of p log(2p / (p + q)) + q log(2q / (p + q)), with 0 log 0 = 0.
// F-PABEE: Flexible-patience-based Early Exiting for Single-label and Multi-label Text Classification Tasks. Xiangxiang
// Gao et al. ICASSP 2023, arXiv 2305.11916.
// With s = p + q and d = (p - q) / s the divergence is a quarter of the sum over c of
// s ((1 + d) log(1 + d) + (1 - d) log(1 - d)), computed as a series near d = 0, where the logarithms cancel each other.
// State: number of consecutive close exits, then the last probabilities, initially NaN, to which nothing is close.
#pragma once

#include "../row.h"

namespace earlyexit {

struct DivergencePatience {
  static constexpr bool needs_aux = false;
  static constexpr int param_count = 2;  // threshold, patience
  static constexpr int state_width = 1;
  static constexpr int state_per_class = 1;

  // (1 + d) log(1 + d) + (1 - d) log(1 - d), the sum of d^2k / (k (2k - 1)), for d in [-1, 1].
  static EE_HD float apart_by(float d) {
    const float d2 = d * d;
    if (d2 < 0.0625f) {
      return d2 * (1.0f + d2 * (1.0f / 6 + d2 * (1.0f / 15 + d2 * (1.0f / 28 + d2 * (1.0f / 45)))));
    }
    return (1.0f + d) * safe_log(1.0f + d) + (1.0f - d) * safe_log(1.0f - d);
  }

  static EE_HD bool step(const Row& row) {
    float& close = row.state[0];
    const float top = row.z[top_class(row)];
    const float sum = softmax_sum(row, top);
    float apart = 0.0f;
    for (int c = 0; c < row.classes; ++c) {
      float& last = row.state[(1 + c) * row.stride];
      const float p = expf(below_top(row.z[c], top)) / sum;
      const float q = last;
      const float both = p + q;
      apart += both * apart_by(both > 0.0f ? (p - q) / both : 0.0f);
      last = p;
    }
    const float threshold = row.params[0];
    close = 0.25f * apart < threshold && threshold > 0.0f ? close + 1.0f : 0.0f;
    return close >= row.params[1];
  }
};

}  // namespace earlyexit
