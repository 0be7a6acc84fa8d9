// SPDX-License-Identifier: Apache-2.0
#include "model.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "json.h"
#include "parallel.h"

namespace engine {
namespace {

constexpr const char* kModelFormat = "latte_ext.LatteLM 1";

Config config_of(const SafeTensors& file) {
  const auto format = file.metadata.find("format"), config = file.metadata.find("config");
  if (format == file.metadata.end() || format->second != kModelFormat)
    throw Error("model", "file has the format " +
                             (format == file.metadata.end() ? "of something else"
                                                            : json_quoted(format->second)) +
                             ", expected " + json_quoted(kModelFormat));
  if (config == file.metadata.end()) throw Error("model", "file has no config, expected one");
  return Config::parse(Json::parse(config->second));
}

// What one generated token reads: everything but an embedding that is not the head too.
int64_t bytes_per_token(const SafeTensors& file) {
  int64_t elements = 0;
  for (const auto& [name, tensor] : file.tensors) {
    int64_t count = name == "embedding.weight" && file.tensors.count("head.weight") ? 0 : 1;
    for (const int64_t size : tensor.shape) count *= size;
    elements += count;
  }
  return elements * static_cast<int64_t>(sizeof(float));
}

Linear linear(SafeTensors& file, const std::string& prefix, int64_t inputs, int64_t outputs,
              bool bias) {
  const std::vector<float> weight = file.take(prefix + ".weight", {outputs, inputs});
  Linear layer(inputs, outputs);
  layer.set(0, weight, bias ? file.take(prefix + ".bias", {outputs}) : std::vector<float>{});
  return layer;
}

float silu(float x) { return x / (1 + std::exp(-x)); }

float gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678f)); }

}  // namespace

Norm::Norm(const Config& config, SafeTensors& file, const std::string& prefix)
    : centred_(config.norm == Config::Norm::layer),
      width_(config.embed_dim),
      weight_(file.take(prefix + "weight", {width_})) {
  if (centred_) bias_ = file.take(prefix + "bias", {width_});
}

void Norm::operator()(const float* x, int64_t tokens, float* y) const {
  const auto width = static_cast<float>(width_);
  for (int64_t t = 0; t < tokens; ++t, x += width_, y += width_) {
    float mean = 0, square = 0;
    if (centred_) {
      for (int64_t c = 0; c < width_; ++c) mean += x[c];
      mean /= width;
    }
    for (int64_t c = 0; c < width_; ++c) square += (x[c] - mean) * (x[c] - mean);
    const float factor = 1 / std::sqrt(square / width + (centred_ ? 1e-5f : 1e-6f));
    for (int64_t c = 0; c < width_; ++c) {
      const auto i = static_cast<size_t>(c);
      y[c] = (x[c] - mean) * factor * weight_[i] + (centred_ ? bias_[i] : 0.0f);
    }
  }
}

Block::Block(const Config& config, SafeTensors& file, const std::string& prefix)
    : config_(config),
      attention_norm_(config, file, prefix + "attention_norm."),
      mlp_norm_(config, file, prefix + "mlp_norm."),
      mixer_(config, file, prefix + "mixer."),
      attention_(config, file, prefix + "attention."),
      mlp_in_(linear(file, prefix + "mlp_in", config.embed_dim,
                     config.mlp_dim * (config.mlp == Config::Mlp::silu ? 2 : 1), config.bias)),
      mlp_out_(linear(file, prefix + "mlp_out", config.mlp_dim, config.embed_dim, config.bias)) {}

void Block::operator()(float* x, int64_t tokens, BlockState& state, Caller& call) const {
  const auto size = static_cast<size_t>(tokens * config_.embed_dim);
  std::vector<float> normed(size), mixed(size);
  attention_norm_(x, tokens, normed.data());
  mixer_(normed.data(), tokens, mixed.data(), state.mixer, call);
  attention_(normed.data(), mixed.data(), tokens, x, state.attention, call);
  mlp(x, tokens, call);
}

void Block::mlp(float* x, int64_t tokens, Caller& call) const {
  const int64_t width = config_.embed_dim, hidden = config_.mlp_dim, row = mlp_in_.outputs();
  std::vector<float> normed(static_cast<size_t>(tokens * width));
  std::vector<float> rows(static_cast<size_t>(tokens * row));
  mlp_norm_(x, tokens, normed.data());
  mlp_in_(normed.data(), width, tokens, rows.data(), row, call.threads());
  const bool gated = config_.mlp == Config::Mlp::silu;
  parallel_for(tokens, call.threads(), [&](int64_t t) {
    float* const h = rows.data() + t * row;
    for (int64_t c = 0; c < hidden; ++c) h[c] = gated ? silu(h[c]) * h[hidden + c] : gelu(h[c]);
  });
  mlp_out_(rows.data(), row, tokens, x, width, call.threads(), true);
}

Model Model::load(const std::filesystem::path& path) { return Model(SafeTensors::read(path)); }

Model::Model(SafeTensors file)
    : fingerprint_(std::to_string(file.checksum())),
      weight_bytes_(bytes_per_token(file)),
      config_(config_of(file)),
      embedding_(file.take("embedding.weight", {config_.vocab_size, config_.embed_dim})),
      norm_(config_, file, "norm."),
      head_(config_.embed_dim, config_.vocab_size) {
  head_.set(0, config_.tie_head
                   ? embedding_
                   : file.take("head.weight", {config_.vocab_size, config_.embed_dim}));
  for (int64_t i = 0; i < config_.num_layers; ++i)
    blocks_.emplace_back(config_, file, "blocks." + std::to_string(i) + ".");
  file.check_all_taken();
}

}  // namespace engine
