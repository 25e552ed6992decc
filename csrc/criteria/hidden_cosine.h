// Hidden cosine: leave if cos(h_l, h_{l-1}) >= threshold, with h pooled as for the exits.
// Confident Adaptive Language Modeling. Tal Schuster et al. NeurIPS 2022, arXiv 2207.07061 ("hidden-state saturation").
#pragma once

#include "../row.h"

namespace earlyexit {

struct HiddenCosine {
  static constexpr bool needs_aux = true;  // the cosine
  static constexpr int param_count = 1;    // threshold
  static constexpr int state_width = 0;
  static constexpr int state_per_class = 0;

  static EE_HD bool step(const Row& row) { return row.aux >= row.params[0]; }
};

}  // namespace earlyexit
