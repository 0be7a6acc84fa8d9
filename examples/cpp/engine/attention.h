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

/// What the attention of one layer remembers: a fixed size, whatever the number of tokens.
struct AttentionState {
  explicit AttentionState(const Config& config);

  // The latents (heads, L), (heads, L), (heads, L, D) of latte::State, heads = state_heads().
  std::vector<float> max, norm, mean;
  // The ring of latte::WindowRing, tokens outermost: (window, kv_heads, D).
  std::vector<float> key, value;
  std::vector<uint8_t> valid;  // (window,)
  int64_t position = 0;        // tokens so far
};

/// `latte_ext.nn.MacchiatoAttention` in evaluation mode: window and latents in one probability, or
/// one of the two.
class Attention {
 public:
  /// Reads the tensors `prefix`... of `file`. @throws Error if one is missing or does not fit.
  Attention(const Config& config, SafeTensors& file, const std::string& prefix);

  /// y (tokens, E) += attention of x (tokens, E), the latents' queries and keys from x_qk.
  void operator()(const float* x, const float* x_qk, int64_t tokens, float* y,
                  AttentionState& state, Caller& call) const;

 private:
  struct Rows;  // the projections of a call

  void latents(const Rows& rows, AttentionState& state, Caller& call) const;
  void window(const Rows& rows, AttentionState& state, Caller& call) const;
  void step(const Rows& rows, AttentionState& state, Caller& call) const;
  latte::LatentAttentionForward latent_part(const Rows& rows, AttentionState& state,
                                            AttentionState& after) const;
  void rotate(Rows& rows, double base, int64_t first, Caller& call) const;
  void remember(const std::vector<float>& keys, const std::vector<float>& values, int64_t tokens,
                AttentionState& state) const;

  Config config_;
  Linear inputs_;  // q, k of the window; v
  Linear logits_;  // q, k of the latents
  Linear output_;
};

}  // namespace engine
