// The exit rules, in the order of RULES in earlyexit_kernels/criteria/__init__.py, whose files name their sources.
// Compiled for the host and, with nvcc, for the device.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define EE_HD __host__ __device__
// Before a loop over classes, which one thread runs: unrolled, the loops are most of the code of a kernel.
#define EE_ROLLED _Pragma("unroll 1")
#define EE_UNROLLED _Pragma("unroll")
#else
#define EE_HD
#define EE_ROLLED
#define EE_UNROLLED
#endif

// X(name of the rule in Python, functor)
#define EE_CRITERIA(X)                       \
  X(full_depth, FullDepth)                   \
  X(entropy, Entropy)                        \
  X(max_probability, MaxProbability)         \
  X(margin, Margin)                          \
  X(patience, Patience)                      \
  X(q_exit, QExit)                           \
  X(sampled_exit, SampledExit)               \
  X(expectation, Expectation)                \
  X(voting, Voting)                          \
  X(dact, Dact)                              \
  X(learned, Learned)                        \
  X(patient_confidence, PatientConfidence)   \
  X(divergence_patience, DivergencePatience) \
  X(hidden_cosine, HiddenCosine)             \
  X(energy, Energy)                          \
  X(fixed_layer, FixedLayer)

namespace earlyexit {

// The arguments of a rule for one row at one exit.
struct Row {
  const float* z;  // [classes] logits of this exit
  int classes;
  float aux;  // the scalar of this row and exit, if the rule needs one
  float* state;
  int64_t stride;
  int layer;            // 1-based
  int depth;            // number of layers
  const float* params;  // parameters of the rule at this layer
  float* answer;        // [classes], holds z on entry; a rule may replace it by another answer

  // Value k of the state of this row; those of the classes come last.
  EE_HD float& kept(int k) const { return state[k * stride]; }
  EE_HD bool at_last() const { return layer == depth; }
};

// What a functor has beside `static bool step(const Row&)`, which updates the state and returns whether the row leaves:
// whether it needs `aux`, how many `params` it reads, and how many values of state a row has, and each class of a row.
// `step` is called with valid logits only (see is_invalid).
template <bool kAux, int kParams, int kState, int kPerClass>
struct Uses {
  static constexpr bool needs_aux = kAux;
  static constexpr int params = kParams;
  static EE_HD int64_t state_size(int64_t classes) { return kState + kPerClass * classes; }
};

// Returns whether the softmax of the logits is undefined: any NaN, more than one +inf, or all -inf.
EE_HD inline bool is_invalid(const float* z, int classes) {
  int top_heavy = 0;  // +inf once, NaN twice
  int above_floor = 0;
  EE_ROLLED for (int c = 0; c < classes; ++c) {
    top_heavy += !(z[c] < INFINITY);
    top_heavy += z[c] != z[c];
    above_floor += z[c] > -INFINITY;
  }
  return top_heavy > 1 || above_floor == 0;
}

// Returns the class with the largest logit; ties go to the lowest class.
EE_HD inline int top_class(const Row& row) {
  int top = 0;
  EE_ROLLED for (int c = 1; c < row.classes; ++c) {
    if (row.z[c] > row.z[top]) top = c;
  }
  return top;
}

// Returns z - top, and 0 for the top itself, also if it is +inf.
EE_HD inline float below_top(float z, float top) { return z == top ? 0.0f : z - top; }

// The softmax of the logits of a row: p = exp(z - top) / sum.
struct Softmax {
  int best;
  float top;
  float sum;  // of exp(z - top), which is 1 for the top class

  EE_HD explicit Softmax(const Row& row) : best(top_class(row)), top(row.z[best]), sum(0.0f) {
    EE_ROLLED for (int c = 0; c < row.classes; ++c) sum += expf(below_top(row.z[c], top));
  }
  EE_HD float p(float z) const { return expf(below_top(z, top)) / sum; }
};

// Returns H(softmax z) in nats. With d = z - max z and s = sum exp(d): H = log s - sum exp(d) d / s, where 0 log 0 = 0.
EE_HD inline float entropy_nats(const Row& row) {
  const float top = row.z[top_class(row)];
  float sum = 0.0f;
  float weighted = 0.0f;
  EE_ROLLED for (int c = 0; c < row.classes; ++c) {
    const float d = below_top(row.z[c], top);
    const float e = expf(d);
    sum += e;
    if (e > 0.0f) weighted += e * d;
  }
  return logf(sum) - weighted / sum;
}

EE_HD inline float log_classes(const Row& row) { return logf(static_cast<float>(row.classes)); }

// Returns log p, with p clamped to the smallest normal number.
EE_HD inline float safe_log(float p) { return logf(p > FLT_MIN ? p : FLT_MIN); }

// Counts consecutive exits at which a condition holds, and returns whether there are as many as required.
EE_HD inline bool lasts(bool holds, float& count, float required) {
  count = holds ? count + 1.0f : 0.0f;
  return count >= required;
}

// Multiplies the probability of not having halted, initially 1, by that of not halting here, and returns it.
EE_HD inline float survive(const Row& row) { return row.kept(0) *= 1.0f - row.aux; }

struct FullDepth : Uses<false, 0, 0, 0> {
  static EE_HD bool step(const Row&) { return false; }
};

// Params: threshold, normalized (0 or 1).
struct Entropy : Uses<false, 2, 0, 0> {
  static EE_HD bool step(const Row& row) {
    const float scale = row.params[1] > 0.0f ? log_classes(row) : 1.0f;
    return entropy_nats(row) < row.params[0] * scale;
  }
};

// Params: threshold.
struct MaxProbability : Uses<false, 1, 0, 0> {
  static EE_HD bool step(const Row& row) { return 1.0f / Softmax(row).sum >= row.params[0]; }
};

// Params: threshold. A tie at the top has no margin.
struct Margin : Uses<false, 1, 0, 0> {
  static EE_HD bool step(const Row& row) {
    const Softmax softmax(row);
    float runner_up = -INFINITY;
    EE_ROLLED for (int c = 0; c < row.classes; ++c) {
      if (c != softmax.best && row.z[c] > runner_up) runner_up = row.z[c];
    }
    return (1.0f - expf(below_top(runner_up, softmax.top))) / softmax.sum >= row.params[0];
  }
};

// Params: patience, tolerance (negative: compare labels). State: the last label or output, initially NaN, with which
// nothing agrees; and the number of consecutive agreements.
struct Patience : Uses<false, 2, 2, 0> {
  static EE_HD bool step(const Row& row) {
    const float last = row.kept(0), tolerance = row.params[1];
    const bool labels = tolerance < 0.0f;
    const float now = labels ? static_cast<float>(top_class(row)) : row.z[0];
    const bool agrees = labels ? now == last : fabsf(now - last) < tolerance;
    row.kept(0) = now;
    return lasts(agrees, row.kept(1), row.params[0]);
  }
};

// Params: q. Aux: lambda in [0, 1]. State: see survive.
struct QExit : Uses<true, 1, 1, 0> {
  static EE_HD bool step(const Row& row) {
    const float q = row.params[0];
    return 1.0f - survive(row) > q || q <= 0.0f;
  }
};

// Aux: lambda in [0, 1]. State: see survive; the row's uniform number, written by the host only.
struct SampledExit : Uses<true, 0, 2, 0> {
  static EE_HD bool step(const Row& row) { return 1.0f - survive(row) > row.kept(1); }
};

// Aux: lambda in [0, 1]. State: see survive; then the weighted sum of each class, initially 0.
struct Expectation : Uses<true, 0, 1, 1> {
  static EE_HD bool step(const Row& row) {
    const bool one_output = row.classes == 1;
    const float survival = row.kept(0);
    const float weight = row.at_last() ? survival : survival * row.aux;
    const Softmax softmax(row);
    EE_ROLLED for (int c = 0; c < row.classes; ++c) {
      float& mean = row.kept(1 + c);
      if (weight > 0.0f) mean += weight * (one_output ? row.z[c] : softmax.p(row.z[c]));
      if (row.at_last()) row.answer[c] = one_output ? mean : safe_log(mean);
    }
    survive(row);
    return false;
  }
};

// Params: votes required at this layer, whether the last layer answers with its own logits. State: for each class,
// votes * 4096 + the layer of its last vote, initially 0.
struct Voting : Uses<false, 2, 0, 1> {
  static constexpr float kBallot = 4096.0f;

  static EE_HD float votes(float ballots) { return floorf(ballots / kBallot); }

  static EE_HD bool step(const Row& row) {
    float& voted = row.kept(top_class(row));
    voted = (votes(voted) + 1.0f) * kBallot + static_cast<float>(row.layer);
    float top = 0.0f;
    float total = static_cast<float>(row.classes) + 0.5f;
    EE_ROLLED for (int c = 0; c < row.classes; ++c) {
      const float ballots = row.kept(c);
      total += votes(ballots);
      if (ballots > top) top = ballots;
    }
    const bool leaves = top >= row.params[0] * kBallot;
    if (row.at_last() ? row.params[1] > 0.0f : !leaves) return leaves;
    EE_ROLLED for (int c = 0; c < row.classes; ++c) {
      const float ballots = row.kept(c);
      row.answer[c] = logf((votes(ballots) + (ballots == top ? 1.5f : 1.0f)) / total);
    }
    return leaves;
  }
};

// Params: tight (0 or 1), epsilon. Aux: lambda in [0, 1]. State: p, see survive; then a of each class, initially 0.
struct Dact : Uses<true, 2, 1, 1> {
  static constexpr float kMargin = 1e-6f;  // for rounding and ties

  static EE_HD bool step(const Row& row) {
    const float before = row.kept(0), p = survive(row);
    const Softmax softmax(row);
    float top = 0.0f;
    float second = 0.0f;
    EE_ROLLED for (int c = 0; c < row.classes; ++c) {
      float& a = row.kept(1 + c);
      a += (softmax.p(row.z[c]) - a) * before;
      second = a > top ? top : a > second ? a : second;
      top = a > top ? a : top;
      row.answer[c] = a;
    }
    const bool leaves = is_decided(row, p, top, second) || (row.params[1] > 0.0f && p <= row.params[1]);
    if (!leaves && !row.at_last()) return false;
    EE_ROLLED for (int c = 0; c < row.classes; ++c) row.answer[c] = safe_log(row.answer[c]);
    return leaves;
  }

  // Returns whether the layers that are left cannot change the largest class of a.
  static EE_HD bool is_decided(const Row& row, float p, float top, float second) {
    const float left = static_cast<float>(row.depth - row.layer);
    // kept <= 1 / (1 + p left), so neither lead can suffice; saves an exponential and a logarithm
    if (top - second - p * left <= kMargin) return false;
    const float kept = expf(left * safe_log(1.0f - p));
    const bool tight = row.params[0] > 0.0f;
    return (tight ? (1.0f + top - second) * kept - 1.0f : top * kept - second - p * left) > kMargin;
  }
};

// Params: threshold. Aux: the uncertainty that a head predicts, in [0, 1].
struct Learned : Uses<true, 1, 0, 0> {
  static EE_HD bool step(const Row& row) { return row.aux < row.params[0]; }
};

// Params: threshold, patience. State: the number of consecutive sure exits, initially 0.
struct PatientConfidence : Uses<false, 2, 1, 0> {
  static EE_HD bool step(const Row& row) {
    const bool sure = entropy_nats(row) < row.params[0] * log_classes(row);
    return lasts(sure, row.kept(0), row.params[1]);
  }
};

// Params: threshold, patience. State: the number of consecutive close exits; then the last probabilities, initially
// NaN, to which nothing is close.
struct DivergencePatience : Uses<false, 2, 1, 1> {
  // f(d) of divergence_of in Python.
  static EE_HD float divergence_term(float d) {
    const float d2 = d * d;
    if (d2 < 0.0625f) {
      return d2 * (1.0f + d2 * (1.0f / 6 + d2 * (1.0f / 15 + d2 * (1.0f / 28 + d2 * (1.0f / 45)))));
    }
    return (1.0f + d) * safe_log(1.0f + d) + (1.0f - d) * safe_log(1.0f - d);
  }

  static EE_HD bool step(const Row& row) {
    const Softmax softmax(row);
    float divergence = 0.0f;
    EE_ROLLED for (int c = 0; c < row.classes; ++c) {
      float& last = row.kept(1 + c);
      const float p = softmax.p(row.z[c]), q = last, both = p + q;
      divergence += both * divergence_term(both > 0.0f ? (p - q) / both : 0.0f);
      last = p;
    }
    const bool close = 0.25f * divergence < row.params[0] && row.params[0] > 0.0f;
    return lasts(close, row.kept(0), row.params[1]);
  }
};

// Params: threshold. Aux: the cosine of the hidden states of this and the last layer, pooled as for the exits.
struct HiddenCosine : Uses<true, 1, 0, 0> {
  static EE_HD bool step(const Row& row) { return row.aux >= row.params[0]; }
};

// Params: threshold.
struct Energy : Uses<false, 1, 0, 0> {
  static EE_HD bool step(const Row& row) {
    const Softmax softmax(row);
    return 1.0f / (1.0f + softmax.sum * expf(softmax.top)) < row.params[0];
  }
};

// Params: layer.
struct FixedLayer : Uses<false, 1, 0, 0> {
  static EE_HD bool step(const Row& row) { return static_cast<float>(row.layer) >= row.params[0]; }
};

}  // namespace earlyexit
