// The arguments of a criterion for one row at one exit, and the softmax functions that several criteria share.
// Compiled for the host and, with nvcc, for the device.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define EE_HD __host__ __device__
// Before a loop over classes, which one thread runs: unrolled, the loops are most of the code of a kernel.
#define EE_ROLLED _Pragma("unroll 1")
#else
#define EE_HD
#define EE_ROLLED
#endif

namespace earlyexit {

// A functor of csrc/criteria defines `needs_aux`, `param_count`, `state_width`, `state_per_class` and
// `static bool step(const Row&)`, which updates the state and returns whether the row leaves. The state of a row has
// state_width + state_per_class * classes numbers, those of the classes last. `step` is called with valid logits only
// (see is_invalid).
struct Row {
  const float* z;       // [classes] logits of this exit
  int classes;
  float aux;            // the scalar of this row and exit, if the criterion needs one
  float* state;         // value k of this row is state[k * stride]
  int64_t stride;
  int layer;            // 1-based
  int depth;            // number of layers
  const float* params;  // parameters of the criterion at this layer
  float* answer;        // [classes], holds z on entry; a criterion may replace it by another answer
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

// Returns sum_c exp(z_c - top); the probability of class c is exp(z_c - top) divided by it.
EE_HD inline float softmax_sum(const Row& row, float top) {
  float sum = 0.0f;
  EE_ROLLED for (int c = 0; c < row.classes; ++c) sum += expf(below_top(row.z[c], top));
  return sum;
}

// Returns H(softmax z) in nats. With d_c = z_c - max z and s = sum_c exp(d_c): H = log s - sum_c exp(d_c) d_c / s,
// where 0 log 0 = 0.
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

// Returns whether the row is answered at this exit: it leaves, or this is the last layer.
EE_HD inline bool answers_now(const Row& row, bool leaves) { return leaves || row.layer == row.depth; }

// Returns log p, with p clamped to the smallest normal number.
EE_HD inline float safe_log(float p) { return logf(p > FLT_MIN ? p : FLT_MIN); }

}  // namespace earlyexit
