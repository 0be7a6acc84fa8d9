// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "config.h"
#include "linear.h"
#include "ops.h"
#include "safetensors.h"

namespace engine {

/// What the mixer of one layer remembers.
struct MixerState {
  explicit MixerState(const Config& config);

  std::vector<float> inputs;  // of the convolution, oldest first (K - 1, E)
  std::vector<float> hidden;  // of the RG-LRU (E,)
  bool fresh = true;          // no token yet
};

/// What the latents' queries and keys are computed from: nothing, `ShortConv` or `RGLRU` of
/// `latte_ext.nn`.
class Mixer {
 public:
  Mixer(const Config& config, SafeTensors& file, const std::string& prefix);

  /// y (tokens, E) of x (tokens, E). Without a mixer: a copy.
  void operator()(const float* x, int64_t tokens, float* y, MixerState& state, Caller& call) const;

 private:
  void convolve(const float* x, int64_t tokens, float* y, MixerState& state, Caller& call) const;
  void recur(const float* x, int64_t tokens, float* y, MixerState& state, Caller& call) const;

  Config config_;
  std::vector<float> weight_, bias_;  // of the convolution
  std::vector<float> log_lambda_;
  std::vector<Linear> gates_;  // gate_a of every block, then gate_x
};

}  // namespace engine
