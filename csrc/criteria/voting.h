// Voting: every exit votes for its label; leave if a class has the required votes, and answer with the log of the
// smoothed shares, (v_c + 1 + [c wins] / 2) / (sum v + C + 1/2). The class with most votes wins; ties go to the most
// recent vote.
// Early Exiting with Ensemble Internal Classifiers. Tianxiang Sun et al. arXiv 2105.13792.
// State: for each class, votes * 4096 + the layer of its last vote, initially 0.
#pragma once

#include "../row.h"

namespace earlyexit {

struct Voting {
  static constexpr bool needs_aux = false;
  static constexpr int param_count = 2;  // votes required at this layer, whether layer L answers with its own logits
  static constexpr int state_width = 0;
  static constexpr int state_per_class = 1;

  static EE_HD float votes(float ballots) { return floorf(ballots / 4096.0f); }

  static EE_HD bool step(const Row& row) {
    float& voted = row.state[top_class(row) * row.stride];
    voted = (votes(voted) + 1.0f) * 4096.0f + static_cast<float>(row.layer);
    float top = 0.0f;
    float total = static_cast<float>(row.classes) + 0.5f;
    EE_ROLLED for (int c = 0; c < row.classes; ++c) {
      const float ballots = row.state[c * row.stride];
      total += votes(ballots);
      if (ballots > top) top = ballots;
    }
    const bool leaves = top >= row.params[0] * 4096.0f;
    const bool keeps_last = row.layer == row.depth && row.params[1] > 0.0f;
    if (!answers_now(row, leaves) || keeps_last) return leaves;
    EE_ROLLED for (int c = 0; c < row.classes; ++c) {
      const float ballots = row.state[c * row.stride];
      row.answer[c] = logf((votes(ballots) + (ballots == top ? 1.5f : 1.0f)) / total);
    }
    return leaves;
  }
};

}  // namespace earlyexit
