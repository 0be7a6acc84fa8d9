// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "json.h"

namespace engine {

/// `latte_ext.nn.LatteConfig`: the sizes and parts of a model, under the same names.
struct Config {
  enum class Mixer { none, conv, rglru };
  enum class Norm { layer, rms };
  enum class Mlp { gelu, silu };

  int64_t vocab_size = 0, embed_dim = 0, num_layers = 0;
  int64_t num_heads = 0, kv_heads = 0, latent_heads = 0;
  int64_t num_latents = 0, head_dim = 0, window = 0, conv_width = 0, mlp_dim = 0;
  std::optional<double> rotary_base;  ///< none: no rotation
  Mixer mixer = Mixer::none;
  Norm norm = Norm::layer;
  Mlp mlp = Mlp::gelu;
  bool bias = false, tie_head = false;

  /// From the JSON that `latte_ext.nn.save` writes; what is null there gets LatteConfig's default.
  /// @throws Error for a part of another name, a size out of range, sizes that do not divide.
  static Config parse(const Json& json);

  /// Heads of the latents' state: the least common multiple of latent_heads and kv_heads.
  int64_t state_heads() const;
};

}  // namespace engine
