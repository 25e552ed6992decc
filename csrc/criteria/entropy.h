// Entropy: leave if H(softmax z) < threshold, in nats, or H / log C if normalized.
// DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference. Ji Xin et al. ACL 2020, arXiv 2004.12993.
// Normalized: FastBERT: a Self-distilling BERT with Adaptive Inference Time. Weijie Liu et al. ACL 2020, arXiv
// 2004.02178 ("uncertainty" and "speed").
#pragma once

#include "../row.h"

namespace earlyexit {

struct Entropy {
  static constexpr bool needs_aux = false;
  static constexpr int param_count = 2;  // threshold, normalized (0 or 1)
  static constexpr int state_width = 0;
  static constexpr int state_per_class = 0;

  static EE_HD bool step(const Row& row) {
    const float entropy = entropy_nats(row);
    const bool normalized = row.params[1] > 0.0f;
    return (normalized ? entropy / logf(static_cast<float>(row.classes)) : entropy) < row.params[0];
  }
};

}  // namespace earlyexit
