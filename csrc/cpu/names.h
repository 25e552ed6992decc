// The activations of the vector kernels by their names in Python, and their types of weights by dtype.
#pragma once

#include <algorithm>
#include <iterator>
#include <optional>
#include <string_view>

#include "../check.h"
#include "simd/table.h"

namespace earlyexit::cpu {

// In the order of Activation.
constexpr std::string_view kActivations[] = {"none", "gelu", "gelu_tanh", "relu", "tanh"};
// The dtypes of stored weights, in the order of WeightType.
constexpr at::ScalarType kStored[] = {at::kFloat, at::kHalf, at::kBFloat16, at::kByte};

inline Activation find_activation(const char* op, std::string_view name) {
  return find_name<Activation>(op, "activation", kActivations, name);
}

inline std::optional<WeightType> find_type(at::ScalarType dtype) {
  const auto known = std::find(std::begin(kStored), std::end(kStored), dtype);
  if (known == std::end(kStored)) return std::nullopt;
  return static_cast<WeightType>(known - std::begin(kStored));
}

}  // namespace earlyexit::cpu
