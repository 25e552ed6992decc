// Every criterion the skeletons can run: X(name in the ops' `criterion` argument, functor). One line each.
#pragma once

#include "entropy.h"
#include "full_depth.h"
#include "margin.h"
#include "max_probability.h"
#include "patience.h"
#include "q_exit.h"

#define EE_CRITERIA(X)               \
  X(full_depth, FullDepth)           \
  X(entropy, Entropy)                \
  X(max_probability, MaxProbability) \
  X(margin, Margin)                  \
  X(patience, Patience)              \
  X(q_exit, QExit)
