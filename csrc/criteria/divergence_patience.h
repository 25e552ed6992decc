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

  // Sums of at most this many classes are decided from their bounds where these suffice, on the host.
  static constexpr int few_classes = 8;

  // Returns whether a quarter of the sum over c of s f(d) is below the threshold, with f as in `apart_by`. Since
  // d^2 <= f(d) <= 2 log(2) d^2, the logarithms are needed only where these two bounds lie on either side of it; the
  // bounds are widened by far more than the rounding of the sums. NaN is not below.
  static EE_HD bool is_close(const float* p, const float* q, int classes, float threshold) {
    float squares = 0.0f;
    EE_ROLLED for (int c = 0; c < classes; ++c) {
      const float both = p[c] + q[c];
      const float d = both > 0.0f ? (p[c] - q[c]) / both : 0.0f;
      squares += both * d * d;
    }
    squares *= 0.25f;
    if (squares * 0.999f >= threshold) return false;
    if (squares * 1.388f < threshold) return true;
    float apart = 0.0f;
    EE_ROLLED for (int c = 0; c < classes; ++c) {
      const float both = p[c] + q[c];
      apart += both * apart_by(both > 0.0f ? (p[c] - q[c]) / both : 0.0f);
    }
    return 0.25f * apart < threshold;
  }

  static bool step_of_few(const Row& row) {
    float p[few_classes];
    float q[few_classes];
    const float top = row.z[top_class(row)];
    float sum = 0.0f;
    EE_ROLLED for (int c = 0; c < row.classes; ++c) sum += p[c] = expf(below_top(row.z[c], top));
    EE_ROLLED for (int c = 0; c < row.classes; ++c) {
      float& last = row.state[(1 + c) * row.stride];
      q[c] = last;
      last = p[c] /= sum;
    }
    float& close = row.state[0];
    const float threshold = row.params[0];
    close = threshold > 0.0f && is_close(p, q, row.classes, threshold) ? close + 1.0f : 0.0f;
    return close >= row.params[1];
  }

  static EE_HD bool step(const Row& row) {
#if !defined(__CUDA_ARCH__)
    if (row.classes <= few_classes) return step_of_few(row);
#endif
    float& close = row.state[0];
    const float top = row.z[top_class(row)];
    const float sum = softmax_sum(row, top);
    float apart = 0.0f;
    EE_ROLLED for (int c = 0; c < row.classes; ++c) {
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
