// Learned: leave if the uncertainty u_l in [0, 1] predicted by a head is < threshold.
// BERxiT: Early Exiting for BERT with Better Fine-Tuning and Extension to Regression. Ji Xin et al. EACL 2021, ACL
// Anthology 2021.eacl-main.8.
#pragma once

#include "../row.h"

namespace earlyexit {

struct Learned {
  static constexpr bool needs_aux = true;  // u_l
  static constexpr int param_count = 1;    // threshold
  static constexpr int state_width = 0;
  static constexpr int state_per_class = 0;

  static EE_HD bool step(const Row& row) { return row.aux < row.params[0]; }
};

}  // namespace earlyexit
