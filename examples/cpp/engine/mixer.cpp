// SPDX-License-Identifier: Apache-2.0
#include "mixer.h"

#include <algorithm>

namespace engine {
namespace {

latte::Tensor rows_of(const float* data, int64_t rows, int64_t channels) {
  return view(data, {1, rows, channels}, {rows * channels, channels, 1});
}

// The matrices (gates, blocks, width, width) of gate_weight, inputs before outputs, as Linear.
std::vector<Linear> gates_of(const std::vector<float>& weight, const std::vector<float>& bias,
                             int64_t matrices, int64_t width) {
  std::vector<Linear> gates;
  std::vector<float> transposed(static_cast<size_t>(width * width));
  for (int64_t m = 0; m < matrices; ++m) {
    const float* const from = weight.data() + m * width * width;
    for (int64_t i = 0; i < width; ++i)
      for (int64_t o = 0; o < width; ++o)
        transposed[static_cast<size_t>(o * width + i)] = from[i * width + o];
    gates.emplace_back(width, width);
    gates.back().set(0, transposed, {bias.begin() + m * width, bias.begin() + (m + 1) * width});
  }
  return gates;
}

}  // namespace

MixerState::MixerState(const Config& config) {
  const auto width = static_cast<size_t>(config.embed_dim);
  if (config.mixer == Config::Mixer::conv)
    inputs.assign(static_cast<size_t>(config.conv_width - 1) * width, 0.0f);
  if (config.mixer == Config::Mixer::rglru) hidden.assign(width, 0.0f);
}

Mixer::Mixer(const Config& config, SafeTensors& file, const std::string& prefix) : config_(config) {
  const int64_t width = config.embed_dim, blocks = config.num_heads;
  if (config.mixer == Config::Mixer::conv) {
    weight_ = file.take(prefix + "weight", {width, config.conv_width});
    bias_ = file.take(prefix + "bias", {width});
  } else if (config.mixer == Config::Mixer::rglru) {
    const int64_t share = width / blocks;
    gates_ = gates_of(file.take(prefix + "gate_weight", {1, 2, blocks, share, share}),
                      file.take(prefix + "gate_bias", {1, 2, width}), 2 * blocks, share);
    log_lambda_ = file.take(prefix + "log_lambda", {1, width});
  }
}

void Mixer::operator()(const float* x, int64_t tokens, float* y, MixerState& state,
                       Caller& call) const {
  if (config_.mixer == Config::Mixer::conv)
    convolve(x, tokens, y, state, call);
  else if (config_.mixer == Config::Mixer::rglru)
    recur(x, tokens, y, state, call);
  else
    std::copy_n(x, tokens * config_.embed_dim, y);
}

void Mixer::convolve(const float* x, int64_t tokens, float* y, MixerState& state,
                     Caller& call) const {
  const int64_t width = config_.embed_dim, taps = config_.conv_width;
  std::vector<float> after(state.inputs.size());
  latte::ShortConvForward conv;
  conv.x = rows_of(x, tokens, width);
  conv.weight = view(weight_.data(), {width, taps}, {taps, 1});
  conv.bias = view(bias_.data(), {width}, {1});
  conv.initial = rows_of(state.inputs.data(), taps - 1, width);
  conv.y = rows_of(y, tokens, width);
  conv.final = rows_of(after.data(), taps - 1, width);
  call(latte::short_conv_forward, conv);
  state.inputs = std::move(after);
}

void Mixer::recur(const float* x, int64_t tokens, float* y, MixerState& state, Caller& call) const {
  const int64_t width = config_.embed_dim, blocks = config_.num_heads, share = width / blocks;
  std::vector<float> gates(static_cast<size_t>(2 * tokens * width)), after(state.hidden.size());
  for (int64_t g = 0; g < 2 * blocks; ++g) {
    const int64_t gate = g / blocks, block = g % blocks;
    gates_[static_cast<size_t>(g)](x + block * share, width, tokens,
                                   gates.data() + gate * tokens * width + block * share, width,
                                   call.threads());
  }
  latte::RgLruForward unit;
  unit.x = rows_of(x, tokens, width);
  unit.gate_a = rows_of(gates.data(), tokens, width);
  unit.gate_x = rows_of(gates.data() + tokens * width, tokens, width);
  unit.log_lambda = view(log_lambda_.data(), {width}, {1});
  unit.initial = view(state.hidden.data(), {1, width}, {width, 1});
  unit.fresh = view(nullptr, {1}, {1});
  unit.fresh.data = &state.fresh;
  unit.fresh.dtype = latte::DType::boolean;
  unit.y = rows_of(y, tokens, width);
  unit.final = view(after.data(), {1, width}, {width, 1});
  call(latte::rg_lru_forward, unit);
  state.hidden = std::move(after);
  state.fresh = false;
}

}  // namespace engine
