// The arguments of the ops as pointers and sizes, without torch types, so that kernels can take them by value; and the
// decision on one row, shared by the CPU and CUDA implementations.
#pragma once

#include "criteria.h"

namespace earlyexit {

#define EE_RULE(name, Functor) k##Functor,
enum class Rule { EE_CRITERIA(EE_RULE) };
#undef EE_RULE
#define EE_NAME(name, Functor) #name,
constexpr const char* kRuleNames[] = {EE_CRITERIA(EE_NAME)};
#undef EE_NAME

enum class Pooling { kFirst, kMean, kNone };
constexpr const char* kPoolingNames[] = {"first", "mean", "none"};

constexpr int kMaxParams = 3;  // MAX_PARAMS of earlyexit_kernels/criteria/base.py

// exit_step. Sizes as in the schema: B live rows of N requested ones, C classes, width H.
struct Call {
  Rule rule;
  float params[kMaxParams];
  Pooling pooling;
  int layer;
  int depth;
  int64_t rows;      // B
  int64_t requests;  // N
  int64_t classes;   // C
  int64_t width;     // H, 0 where logits are given
  const void* input;   // hidden [T, H], or logits [B, C] where weight is null
  const void* weight;  // [C, H]
  const void* bias;    // [C]
  const int32_t* offsets;  // null: one token per row
  const float* aux;
  int32_t* row_ids;
  float* state;
  float* answers;
  int64_t* exit_layer;

  // Whether the rows of `input` are tokens, addressed through `offsets`, or one vector per row.
  EE_HD bool pools_tokens() const { return offsets != nullptr && pooling != Pooling::kNone; }
  EE_HD bool pools_mean() const { return offsets != nullptr && pooling == Pooling::kMean; }
};

struct Compaction {
  const int32_t* row_ids;
  const int32_t* offsets;
  int32_t* new_ids;
  int32_t* new_offsets;
  int32_t* source;
  int64_t rows;
};

// gather_rows, of tokens of `token_bytes` each.
struct Gather {
  const void* hidden;
  const int32_t* offsets;
  const int32_t* source;
  const int32_t* new_offsets;
  void* out;
  int64_t rows;
  int64_t tokens;  // room in `out`
  int64_t token_bytes;
};

// Returns f(functor of a rule).
template <class F>
auto with_rule(Rule rule, F f) {
#define EE_CASE(name, Functor) \
  case Rule::k##Functor: return f(Functor{});
  switch (rule) {
    default: EE_CRITERIA(EE_CASE)
  }
#undef EE_CASE
}

// Returns the scalar of row i of the batch, 0 if the criterion needs none.
template <class Criterion>
EE_HD float aux_of(const Call& call, int64_t i) {
  return Criterion::needs_aux ? call.aux[i] : 0.0f;
}

struct Decision {
  bool leaves;
  bool invalid;  // invalid logits: the row leaves at the last layer only, and keeps its state
};

// Decides on row n of the request. `answer` holds z on entry and the answer on return.
template <class Criterion>
EE_HD Decision decide(const Call& call, int64_t n, float aux, const float* z, float* answer) {
  const int classes = static_cast<int>(call.classes);
  const bool last = call.layer == call.depth;
  if (is_invalid(z, classes) || aux != aux) return {last, true};
  const bool leaves =
      Criterion::step(Row{z, classes, aux, call.state + n, call.requests, call.layer, call.depth, call.params, answer});
  return {leaves || last, false};
}

}  // namespace earlyexit
