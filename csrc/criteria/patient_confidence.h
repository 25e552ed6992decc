// Patient confidence: leave after `patience` consecutive exits with H(softmax z) / log C < threshold.
// PCEE-BERT: Accelerating BERT Inference via Patient and Confident Early Exiting. Zhen Zhang et al. Findings of NAACL
// 2022, ACL Anthology 2022.findings-naacl.25.
// State: number of consecutive confident exits, initially 0.
#pragma once

#include "../row.h"

namespace earlyexit {

struct PatientConfidence {
  static constexpr bool needs_aux = false;
  static constexpr int param_count = 2;  // threshold, patience
  static constexpr int state_width = 1;
  static constexpr int state_per_class = 0;

  static EE_HD bool step(const Row& row) {
    float& confident = row.state[0];
    const bool sure = entropy_nats(row) < row.params[0] * logf(static_cast<float>(row.classes));
    confident = sure ? confident + 1.0f : 0.0f;
    return confident >= row.params[1];
  }
};

}  // namespace earlyexit
