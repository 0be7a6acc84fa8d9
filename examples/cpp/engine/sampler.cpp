// SPDX-License-Identifier: Apache-2.0
#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "error.h"

namespace engine {

Sampler::Sampler(double temperature, uint64_t seed) : temperature_(temperature), random_(seed) {
  if (!(temperature >= 0) || !std::isfinite(temperature))
    throw Error("sampler",
                "temperature is " + std::to_string(temperature) + ", expected 0 or more");
}

int64_t Sampler::operator()(const std::vector<float>& logits) {
  const auto best = std::max_element(logits.begin(), logits.end());
  if (temperature_ == 0) return best - logits.begin();
  std::vector<double> weights;
  weights.reserve(logits.size());
  for (const float logit : logits)
    weights.push_back(std::exp((static_cast<double>(logit) - *best) / temperature_));
  return std::discrete_distribution<int64_t>(weights.begin(), weights.end())(random_);
}

}  // namespace engine
