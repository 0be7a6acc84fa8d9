// SPDX-License-Identifier: Apache-2.0
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "error.h"

namespace engine {
namespace {

// More than any window needs, and less than what a damaged file could ask for.
constexpr int64_t kMaxStateBytes = int64_t{1} << 34;

int64_t state_size(const Config& config) {
  const int64_t latents = config.state_heads() * config.num_latents * (2 + config.head_dim);
  return latents + 2 * config.window * config.kv_heads * config.head_dim;
}

// Heads repeated so that each state has its own: (tokens, heads, width) with row numbers apart
// becomes (tokens, times heads, width).
std::vector<float> repeated(const float* data, int64_t row, int64_t tokens, int64_t heads,
                            int64_t width, int64_t times) {
  std::vector<float> out(static_cast<size_t>(tokens * heads * times * width));
  float* to = out.data();
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < times; ++i) to = std::copy_n(data + t * row + h * width, width, to);
  return out;
}

}  // namespace

AttentionState::AttentionState(const Config& config) {
  if (state_size(config) > kMaxStateBytes / 4)
    throw Error("config", "state has " + std::to_string(state_size(config)) +
                              " numbers, expected at most " + std::to_string(kMaxStateBytes / 4));
  const auto logits = static_cast<size_t>(config.state_heads() * config.num_latents);
  max.assign(logits, -std::numeric_limits<float>::infinity());
  norm.assign(logits, 0.0f);
  mean.assign(logits * static_cast<size_t>(config.head_dim), 0.0f);
  key.assign(static_cast<size_t>(config.window * config.kv_heads * config.head_dim), 0.0f);
  value = key;
  valid.assign(static_cast<size_t>(config.window), 0);
}

// What is projected of `tokens` tokens. Heads lie side by side within a row.
struct Attention::Rows {
  int64_t tokens;
  std::vector<float> inputs, logits;  // (tokens, outputs of inputs_), (tokens, outputs of logits_)
  std::vector<float> k_latent, v_latent;  // repeated where heads differ, else empty
  std::vector<float> y;                   // (tokens, H D)
  int64_t k_at = 0, v_at = 0;             // columns of `inputs`; q is at 0
  int64_t k_latent_at = 0;                // column of `logits`; q_latent is at 0
};

Attention::Attention(const Config& config, SafeTensors& file, const std::string& prefix)
    : config_(config) {
  const int64_t width = config.embed_dim, queries = config.num_heads * config.head_dim,
                keys = config.kv_heads * config.head_dim;
  const bool has_window = config.window > 0;
  const auto weight = [&](const char* name, int64_t rows, int64_t columns) {
    return file.take(prefix + name + ".weight", {rows, columns});
  };
  // Taken before memory for as many weights is: the file must have them.
  const std::vector<float> v = weight("v_proj", keys, width);
  std::vector<float> q, k;
  if (has_window) q = weight("q_proj", queries, width), k = weight("k_proj", keys, width);
  inputs_ = Linear(width, (has_window ? queries + keys : 0) + keys);
  if (has_window) inputs_.set(0, q), inputs_.set(queries, k);
  inputs_.set(inputs_.outputs() - keys, v);
  if (config.num_latents > 0) {
    const int64_t choices = config.num_heads * (config.num_latents + has_window),
                  latents = config.latent_heads * config.num_latents;
    const std::vector<float> q_latent = weight("q_latent_proj", choices, width),
                             k_latent = weight("k_latent_proj", latents, width);
    logits_ = Linear(width, choices + latents);
    logits_.set(
        0, q_latent,
        has_window ? file.take(prefix + "q_latent_proj.bias", {choices}) : std::vector<float>{});
    logits_.set(choices, k_latent);
  }
  const std::vector<float> out = weight("out_proj", width, queries);
  output_ = Linear(queries, width);
  output_.set(0, out);
}

void Attention::operator()(const float* x, const float* x_qk, int64_t tokens, float* y,
                           AttentionState& state, Caller& call) const {
  const int64_t width = config_.embed_dim, keys = config_.kv_heads * config_.head_dim;
  Rows rows{tokens,
            std::vector<float>(static_cast<size_t>(tokens * inputs_.outputs())),
            std::vector<float>(static_cast<size_t>(tokens * logits_.outputs())),
            {},
            {},
            std::vector<float>(static_cast<size_t>(tokens * output_.inputs()))};
  inputs_(x, width, tokens, rows.inputs.data(), inputs_.outputs(), call.threads());
  rows.v_at = inputs_.outputs() - keys;
  rows.k_at = rows.v_at - keys;
  if (config_.num_latents > 0) {
    logits_(x_qk, width, tokens, rows.logits.data(), logits_.outputs(), call.threads());
    rows.k_latent_at = logits_.outputs() - config_.latent_heads * config_.num_latents;
    const int64_t heads = config_.state_heads();
    if (heads != config_.latent_heads)
      rows.k_latent =
          repeated(rows.logits.data() + rows.k_latent_at, logits_.outputs(), tokens,
                   config_.latent_heads, config_.num_latents, heads / config_.latent_heads);
    if (heads != config_.kv_heads)
      rows.v_latent = repeated(rows.inputs.data() + rows.v_at, inputs_.outputs(), tokens,
                               config_.kv_heads, config_.head_dim, heads / config_.kv_heads);
  }
  if (config_.window > 0 && config_.rotary_base)
    rotate(rows, *config_.rotary_base, state.position, call);
  if (tokens == 1)
    step(rows, state, call);
  else if (config_.window > 0)
    window(rows, state, call);
  else
    latents(rows, state, call);
  output_(rows.y.data(), output_.inputs(), tokens, y, width, call.threads(), true);
}

void Attention::rotate(Rows& rows, double base, int64_t first, Caller& call) const {
  std::vector<int64_t> position(static_cast<size_t>(rows.tokens));
  std::iota(position.begin(), position.end(), first);
  latte::Rotate rotate;
  // The keys' heads lie behind those of the queries.
  rotate.x = rotate.y = heads_of(rows.inputs.data(), config_.num_heads + config_.kv_heads,
                                 rows.tokens, config_.head_dim, inputs_.outputs());
  rotate.position = view(nullptr, {rows.tokens}, {1});
  rotate.position.data = position.data();
  rotate.position.dtype = latte::DType::int64;
  rotate.base = base;
  rotate.dim = config_.head_dim;
  call(latte::rotate, rotate);
}

latte::LatentAttentionForward Attention::latent_part(const Rows& rows, AttentionState& state,
                                                     AttentionState& after) const {
  const int64_t heads = config_.state_heads(), latents = config_.num_latents,
                dim = config_.head_dim;
  const auto tensors = [&](AttentionState& of) {
    return latte::State{view(of.max.data(), {1, heads, latents}, {0, latents, 1}),
                        view(of.norm.data(), {1, heads, latents}, {0, latents, 1}),
                        view(of.mean.data(), {1, heads, latents, dim}, {0, latents * dim, dim, 1})};
  };
  latte::LatentAttentionForward part;
  part.k = rows.k_latent.empty()
               ? heads_of(rows.logits.data() + rows.k_latent_at, heads, rows.tokens, latents,
                          logits_.outputs())
               : heads_of(rows.k_latent.data(), heads, rows.tokens, latents, heads * latents);
  part.v =
      rows.v_latent.empty()
          ? heads_of(rows.inputs.data() + rows.v_at, heads, rows.tokens, dim, inputs_.outputs())
          : heads_of(rows.v_latent.data(), heads, rows.tokens, dim, heads * dim);
  part.initial = tensors(state);
  part.final = tensors(after);
  part.y = heads_of(rows.y.data(), config_.num_heads, rows.tokens, dim, config_.num_heads * dim);
  return part;
}

void Attention::latents(const Rows& rows, AttentionState& state, Caller& call) const {
  AttentionState after = state;
  latte::LatentAttentionForward params = latent_part(rows, state, after);
  params.q = heads_of(rows.logits.data(), config_.num_heads, rows.tokens, config_.num_latents,
                      logits_.outputs());
  call(latte::latent_attention_forward, params);
  state = std::move(after);
  state.position += rows.tokens;
}

void Attention::window(const Rows& rows, AttentionState& state, Caller& call) const {
  const int64_t heads = config_.num_heads, dim = config_.head_dim, row = config_.kv_heads * dim,
                past = std::min(state.position, config_.window);
  // The ring's keys and values, oldest first, then the new ones.
  std::vector<float> keys, values;
  for (int64_t s = state.position - past; s < state.position; ++s) {
    const int64_t slot = s % config_.window * row;
    keys.insert(keys.end(), state.key.begin() + slot, state.key.begin() + slot + row);
    values.insert(values.end(), state.value.begin() + slot, state.value.begin() + slot + row);
  }
  for (int64_t t = 0; t < rows.tokens; ++t) {
    const auto token = rows.inputs.begin() + t * inputs_.outputs();
    keys.insert(keys.end(), token + rows.k_at, token + rows.k_at + row);
    values.insert(values.end(), token + rows.v_at, token + rows.v_at + row);
  }
  latte::SlidingWindowForward part;
  part.q = heads_of(rows.inputs.data(), heads, rows.tokens, dim, inputs_.outputs());
  part.k = heads_of(keys.data(), config_.kv_heads, past + rows.tokens, dim, row);
  part.v = heads_of(values.data(), config_.kv_heads, past + rows.tokens, dim, row);
  part.y = heads_of(rows.y.data(), heads, rows.tokens, dim, heads * dim);
  part.window = config_.window;
  part.past = past;
  part.scale = 1 / std::sqrt(static_cast<double>(dim));
  AttentionState after = state;
  if (config_.num_latents == 0) {
    call(latte::sliding_window_forward, part);
  } else {
    latte::MacchiatoForward params;
    params.q_latent = heads_of(rows.logits.data(), heads, rows.tokens, 1 + config_.num_latents,
                               logits_.outputs());
    params.latent = latent_part(rows, state, after);
    params.window = part;
    call(latte::macchiato_forward, params);
  }
  state = std::move(after);
  remember(keys, values, rows.tokens, state);
}

void Attention::remember(const std::vector<float>& keys, const std::vector<float>& values,
                         int64_t tokens, AttentionState& state) const {
  const int64_t row = config_.kv_heads * config_.head_dim;
  const int64_t kept = std::min(tokens, config_.window);
  for (int64_t i = 1; i <= kept; ++i) {
    const int64_t slot = (state.position + tokens - i) % config_.window;
    const auto from = static_cast<int64_t>(keys.size()) - i * row;
    std::copy_n(keys.begin() + from, row, state.key.begin() + slot * row);
    std::copy_n(values.begin() + from, row, state.value.begin() + slot * row);
    state.valid[static_cast<size_t>(slot)] = 1;
  }
  state.position += tokens;
}

void Attention::step(const Rows& rows, AttentionState& state, Caller& call) const {
  const int64_t heads = config_.num_heads, dim = config_.head_dim, row = config_.kv_heads * dim;
  latte::LatentAttentionStep latent;
  if (config_.num_latents > 0) {
    const latte::LatentAttentionForward part = latent_part(rows, state, state);
    const int64_t states = config_.state_heads();
    latent.k = token_of(static_cast<float*>(part.k.data), states, config_.num_latents);
    latent.v = token_of(static_cast<float*>(part.v.data), states, dim);
    latent.state = part.initial;
  }
  const latte::Tensor y = token_of(rows.y.data(), heads, dim);
  if (config_.window == 0) {
    latent.q = token_of(rows.logits.data(), heads, config_.num_latents);
    latent.y = y;
    call(latte::latent_attention_step, latent);
    ++state.position;
    return;
  }
  latte::SlidingWindowStep window;
  window.q = token_of(rows.inputs.data(), heads, dim);
  window.k = token_of(rows.inputs.data() + rows.k_at, config_.kv_heads, dim);
  window.v = token_of(rows.inputs.data() + rows.v_at, config_.kv_heads, dim);
  window.ring.key = heads_of(state.key.data(), config_.kv_heads, config_.window, dim, row);
  window.ring.value = heads_of(state.value.data(), config_.kv_heads, config_.window, dim, row);
  window.ring.valid = view(nullptr, {1, config_.window}, {config_.window, 1});
  window.ring.valid.data = state.valid.data();
  window.ring.valid.dtype = latte::DType::boolean;
  window.ring.position = view(nullptr, {1}, {1});
  window.ring.position.data = &state.position;  // the operator counts the token
  window.ring.position.dtype = latte::DType::int64;
  window.y = y;
  window.scale = 1 / std::sqrt(static_cast<double>(dim));
  if (config_.num_latents == 0) {
    call(latte::sliding_window_step, window);
    return;
  }
  latte::MacchiatoStep params;
  params.q_latent = token_of(rows.logits.data(), heads, 1 + config_.num_latents);
  params.latent = latent;
  params.window = window;
  call(latte::macchiato_step, params);
}

}  // namespace engine
