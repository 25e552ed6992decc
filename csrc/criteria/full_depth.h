// Full depth: no row leaves before the last layer. The rule of a model without a criterion.
#pragma once

#include "../row.h"

namespace earlyexit {

struct FullDepth {
  static constexpr bool needs_aux = false;
  static constexpr int param_count = 0;
  static constexpr int state_width = 0;
  static constexpr int state_per_class = 0;

  static EE_HD bool step(const Row&) { return false; }
};

}  // namespace earlyexit
