// SPDX-License-Identifier: Apache-2.0
// Model files for the engine of examples/cpp, with random weights, in the format of
// latte_ext.nn.save. That Python computes the same from the same file: test_cpp_engine.py.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "engine/config.h"
#include "engine/error.h"
#include "engine/safetensors.h"

namespace testing_latte {

struct ModelSizes {
  int64_t vocab = 13, width = 12, layers = 2, heads = 4, kv_heads = 4, latent_heads = 4;
  int64_t latents = 3, window = 0;
  std::string mixer = "none", norm = "rms", mlp = "silu";
  bool bias = false, tied = true;
};

inline std::string config_text(const ModelSizes& m) {
  const auto field = [](const char* name, const std::string& value) {
    return std::string("\"") + name + "\": " + value + ", ";
  };
  const auto flag = [](bool value) { return value ? "true" : "false"; };
  return "{" + field("vocab_size", std::to_string(m.vocab)) +
         field("embed_dim", std::to_string(m.width)) +
         field("num_layers", std::to_string(m.layers)) +
         field("num_heads", std::to_string(m.heads)) +
         field("num_latents", std::to_string(m.latents)) + field("head_dim", "6") +
         field("kv_heads", std::to_string(m.kv_heads)) +
         field("latent_heads", std::to_string(m.latent_heads)) +
         field("window", std::to_string(m.window)) + field("rotary_base", "1e4") +
         field("mixer", "\"" + m.mixer + "\"") + field("conv_width", "4") +
         field("norm", "\"" + m.norm + "\"") + field("mlp", "\"" + m.mlp + "\"") +
         field("mlp_dim", "null") + field("bias", flag(m.bias)) + field("dropout", "0.0") +
         "\"tie_head\": " + flag(m.tied) + "}";
}

// Fills a file tensor by tensor.
class ModelWriter {
 public:
  explicit ModelWriter(uint32_t seed) : random_(seed) {}

  void add(const std::string& name, std::vector<int64_t> shape) {
    int64_t size = 1;
    for (const int64_t n : shape) size *= n;
    std::vector<float> numbers(static_cast<size_t>(size));
    for (float& x : numbers) x = normal_(random_);
    engine::StoredTensor tensor{"F32", std::move(shape), {}};
    tensor.data.resize(numbers.size() * sizeof(float));
    std::memcpy(tensor.data.data(), numbers.data(), tensor.data.size());
    file.tensors[name] = std::move(tensor);
  }

  engine::SafeTensors file;

 private:
  std::mt19937 random_;
  std::normal_distribution<float> normal_{0.0f, 0.4f};
};

inline engine::SafeTensors make_model(const ModelSizes& m, uint32_t seed = 0) {
  ModelWriter writer(seed);
  writer.file.metadata = {{"format", "latte_ext.LatteLM 1"}, {"config", config_text(m)}};
  const engine::Config c = engine::Config::parse(engine::Json::parse(config_text(m)));
  const auto norm = [&](const std::string& prefix) {
    writer.add(prefix + ".weight", {m.width});
    if (m.norm == "layer") writer.add(prefix + ".bias", {m.width});
  };
  const auto linear = [&](const std::string& prefix, int64_t in, int64_t out, bool bias) {
    writer.add(prefix + ".weight", {out, in});
    if (bias) writer.add(prefix + ".bias", {out});
  };
  writer.add("embedding.weight", {m.vocab, m.width});
  if (!m.tied) writer.add("head.weight", {m.vocab, m.width});
  norm("norm");
  for (int64_t i = 0; i < m.layers; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".", attention = block + "attention.";
    norm(block + "attention_norm");
    norm(block + "mlp_norm");
    if (m.mixer == "conv") {
      writer.add(block + "mixer.weight", {m.width, c.conv_width});
      writer.add(block + "mixer.bias", {m.width});
    } else if (m.mixer == "rglru") {
      const int64_t share = m.width / m.heads;
      writer.add(block + "mixer.gate_weight", {1, 2, m.heads, share, share});
      writer.add(block + "mixer.gate_bias", {1, 2, m.width});
      writer.add(block + "mixer.log_lambda", {1, m.width});
    }
    if (m.window > 0) {
      linear(attention + "q_proj", m.width, m.heads * c.head_dim, false);
      linear(attention + "k_proj", m.width, m.kv_heads * c.head_dim, false);
    }
    if (m.latents > 0) {
      linear(attention + "q_latent_proj", m.width, m.heads * (m.latents + (m.window > 0)),
             m.window > 0);
      linear(attention + "k_latent_proj", m.width, m.latent_heads * m.latents, false);
    }
    linear(attention + "v_proj", m.width, m.kv_heads * c.head_dim, false);
    linear(attention + "out_proj", m.heads * c.head_dim, m.width, false);
    linear(block + "mlp_in", m.width, c.mlp_dim * (m.mlp == "silu" ? 2 : 1), m.bias);
    linear(block + "mlp_out", c.mlp_dim, m.width, m.bias);
  }
  return writer.file;
}

template <class Body>
std::string error_of(Body body) {
  try {
    body();
  } catch (const engine::Error& error) {
    return error.what();
  }
  return "no error";
}

// One of every part, and heads that must be repeated on either side.
inline std::vector<ModelSizes> all_sizes() {
  std::vector<ModelSizes> all(7);
  all[0].norm = "layer", all[0].mlp = "gelu", all[0].bias = true, all[0].tied = false;
  all[1].mixer = "conv";
  all[2].mixer = "rglru";
  all[3].mixer = "conv", all[3].window = 5;
  all[4].mixer = "rglru", all[4].window = 5, all[4].latent_heads = 1;
  all[5].latents = 0, all[5].window = 5, all[5].kv_heads = 2;
  all[6].window = 0, all[6].kv_heads = 2, all[6].latent_heads = 1;
  return all;
}

}  // namespace testing_latte
