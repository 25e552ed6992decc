// DACT: with h_n = 1 - lambda_n and y_n = softmax(z_n), p_0 = 1, a_n = y_n p_{n-1} + a_{n-1} (1 - p_{n-1}) and
// p_n = h_n p_{n-1}; leave if the d remaining layers cannot change the largest class of a_n, and answer log a_n.
//   paper: a_top (1 - p)^d > a_second + p d
//   tight: (a_top - a_second) (1 - p)^d > 1 - (1 - p)^d
// Both with a margin of 1e-6, for rounding and ties. With epsilon > 0 also leave if p_n <= epsilon.
// DACT-BERT: Differentiable Adaptive Computation Time for an Efficient BERT Inference. Cristobal Eyzaguirre et al. NLP
// Power 2022, arXiv 2109.11745.
// State: p, initially 1; then a, initially 0.
#pragma once

#include "../row.h"

namespace earlyexit {

struct Dact {
  static constexpr bool needs_aux = true;  // lambda_n in [0, 1]
  static constexpr int param_count = 2;    // tight (0 or 1), epsilon
  static constexpr int state_width = 1;
  static constexpr int state_per_class = 1;

  static EE_HD bool step(const Row& row) {
    const float before = row.state[0];
    const float p = (1.0f - row.aux) * before;
    row.state[0] = p;
    const float top_logit = row.z[top_class(row)];
    float sum = 0.0f;
    EE_ROLLED for (int c = 0; c < row.classes; ++c) sum += row.answer[c] = expf(below_top(row.answer[c], top_logit));
    float top = 0.0f;
    float second = 0.0f;
    float* state = row.state;
    EE_ROLLED for (int c = 0; c < row.classes; ++c) {
      float& a = *(state += row.stride);
      a += (row.answer[c] / sum - a) * before;
      second = a > top ? top : a > second ? a : second;
      top = a > top ? a : top;
      row.answer[c] = a;
    }
    const bool leaves = is_decided(row, p, top, second) || (row.params[1] > 0.0f && p <= row.params[1]);
    if (answers_now(row, leaves)) {
      EE_ROLLED for (int c = 0; c < row.classes; ++c) row.answer[c] = safe_log(row.answer[c]);
    }
    return leaves;
  }

  static EE_HD bool is_decided(const Row& row, float p, float top, float second) {
    constexpr float kMargin = 1e-6f;
    const float left = static_cast<float>(row.depth - row.layer);
    // kept <= 1 / (1 + p left), so neither bound can hold; saves an exponential and a logarithm
    if (top - second - p * left <= kMargin) return false;
    const float kept = expf(left * safe_log(1.0f - p));
    const bool tight = row.params[0] > 0.0f;
    return (tight ? (1.0f + top - second) * kept - 1.0f : top * kept - second - p * left) > kMargin;
  }
};

}  // namespace earlyexit
