// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "attention.h"
#include "config.h"
#include "linear.h"
#include "mixer.h"
#include "ops.h"
#include "safetensors.h"

namespace engine {

/// LayerNorm or RMSNorm over E.
class Norm {
 public:
  Norm(const Config& config, SafeTensors& file, const std::string& prefix);

  /// y (tokens, E) of x (tokens, E).
  void operator()(const float* x, int64_t tokens, float* y) const;

 private:
  bool centred_;
  int64_t width_;
  std::vector<float> weight_, bias_;
};

/// What one block remembers.
struct BlockState {
  explicit BlockState(const Config& config) : attention(config), mixer(config) {}

  AttentionState attention;
  MixerState mixer;
};

/// `latte_ext.nn.LatteBlock` in evaluation mode: x + attention(norm(x)), then x + MLP(norm(x)).
class Block {
 public:
  Block(const Config& config, SafeTensors& file, const std::string& prefix);

  /// Replaces x (tokens, E) by the block's output.
  void operator()(float* x, int64_t tokens, BlockState& state, Caller& call) const;

 private:
  void mlp(float* x, int64_t tokens, Caller& call) const;

  Config config_;
  Norm attention_norm_, mlp_norm_;
  Mixer mixer_;
  Attention attention_;
  Linear mlp_in_, mlp_out_;
};

/// `latte_ext.nn.LatteLM`: what `latte_ext.nn.save` wrote.
class Model {
 public:
  /// @throws Error if the file is damaged, is no LatteLM, or its tensors do not fit its sizes.
  static Model load(const std::filesystem::path& path);
  explicit Model(SafeTensors file);

  const Config& config() const { return config_; }
  /// The file's checksum: a state of another model is refused.
  const std::string& fingerprint() const { return fingerprint_; }
  /// Bytes of weights that every generated token reads.
  int64_t weight_bytes() const { return weight_bytes_; }

 private:
  friend class Session;

  std::string fingerprint_;
  int64_t weight_bytes_ = 0;
  Config config_;
  std::vector<float> embedding_;
  std::vector<Block> blocks_;
  Norm norm_;
  Linear head_;
};

}  // namespace engine
