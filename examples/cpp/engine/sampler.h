// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace engine {

/// Draws tokens from softmax(logits / temperature); temperature 0 takes the most likely one.
class Sampler {
 public:
  /// @throws Error for a temperature that is negative or not finite.
  Sampler(double temperature, uint64_t seed);

  int64_t operator()(const std::vector<float>& logits);

 private:
  double temperature_;
  std::mt19937_64 random_;
};

}  // namespace engine
