// Decides when the device-resident loop compacts its rows.
#pragma once

#include "row.h"

namespace earlyexit {

EE_HD inline int64_t tiles_of(int64_t tokens, int64_t tile) { return (tokens + tile - 1) / tile; }

// Returns whether compaction to the live tokens saves at least one tile per layer.
EE_HD inline bool moving_pays(int64_t live, int64_t present, int64_t tile) {
  return tiles_of(live, tile) < tiles_of(present, tile);
}

}  // namespace earlyexit
