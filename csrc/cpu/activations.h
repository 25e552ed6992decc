// The activations of the vector kernels, by the names that the ops have for them.
#pragma once

#include <string>
#include <string_view>

#include "../checks.h"
#include "kernels/kernels.h"

namespace earlyexit::cpu {

struct NamedActivation {
  std::string_view name;
  Activation activation;
};

constexpr NamedActivation kActivations[] = {{"none", Activation::kNone},
                                            {"gelu", Activation::kGelu},
                                            {"gelu_tanh", Activation::kGeluTanh},
                                            {"relu", Activation::kRelu},
                                            {"tanh", Activation::kTanh}};

inline Activation find_activation(const char* op, std::string_view name) {
  std::string names;
  for (const NamedActivation& known : kActivations) {
    if (name == known.name) return known.activation;
    names += (names.empty() ? "'" : ", '") + std::string(known.name) + "'";
  }
  EE_CHECK(false, op, "expected activation to be one of ", names, ", got '", name, "'");
}

}  // namespace earlyexit::cpu
