// All criteria of the compiled back-end, one line each: X(value of the ops' argument `criterion`, functor).
#pragma once

#include "dact.h"
#include "divergence_patience.h"
#include "energy.h"
#include "entropy.h"
#include "expectation.h"
#include "full_depth.h"
#include "hidden_cosine.h"
#include "learned.h"
#include "margin.h"
#include "max_probability.h"
#include "patience.h"
#include "patient_confidence.h"
#include "q_exit.h"
#include "sampled_exit.h"
#include "voting.h"

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
  X(energy, Energy)
