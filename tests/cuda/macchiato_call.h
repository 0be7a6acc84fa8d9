// SPDX-License-Identifier: Apache-2.0
// A random call of Macchiato for the CPU, which the Python tests check against the definition, and
// for CUDA, which is compared with it.
#pragma once

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "problem.h"

namespace testing_latte {

struct MacchiatoCase {
  int64_t batch = 2, heads = 4, kv_heads = 2, latent_heads = 2, tokens = 90, latents = 7;
  int64_t key_dim = 12, dim = 10, window = 20, sinks = 0;
  bool causal = true, masked = false, state = false, one_value = false;
  std::vector<int64_t> borders;
  DType type = DType::float32;

  DType compute() const { return type == DType::float64 ? DType::float64 : DType::float32; }
  int64_t sequences() const {
    return borders.empty() ? batch : static_cast<int64_t>(borders.size()) - 1;
  }
  std::string text() const {
    return std::string(name_of(type)) + " L=" + std::to_string(latents) +
           (causal ? " causal" : " symmetric") + " n=" + std::to_string(sinks) +
           (masked ? " masked" : "") + (state ? " state" : "") + (borders.empty() ? "" : " packed");
  }
};

class MacchiatoCall {
 public:
  explicit MacchiatoCall(const MacchiatoCase& shape) : c(shape) {
    const int64_t n = c.sequences();
    q_latent = Array(c.compute(), {c.batch, c.heads, c.tokens, 1 + c.latents});
    k_latent = Array(c.type, {c.batch, c.latent_heads, c.tokens, c.latents});
    v_latent = Array(c.type, {c.batch, c.latent_heads, c.tokens, c.dim});
    q = Array(c.type, {c.batch, c.heads, c.tokens, c.key_dim});
    k = Array(c.type, {c.batch, c.kv_heads, c.tokens, c.key_dim});
    v = Array(c.type, {c.batch, c.kv_heads, c.tokens, c.dim});
    y = Array(c.type, {c.batch, c.heads, c.tokens, c.dim});
    total = Array(c.compute(), {c.batch, c.heads, c.tokens, c.dim});
    wide = total.like();
    log_sum = Array(c.compute(), {c.batch, c.heads, c.tokens});
    for (Array* a : {&q_latent, &k_latent, &v_latent, &q, &k, &v}) fill(*a);
    if (c.sinks > 0) {
      q_sink = q.like();
      k_sink = Array(c.type, {n, c.kv_heads, c.sinks, c.key_dim});
      v_sink = Array(c.type, {n, c.kv_heads, c.sinks, c.dim});
      for (Array* a : {&q_sink, &k_sink, &v_sink}) fill(*a);
    }
    if (c.masked) {
      mask = Array(DType::boolean, {c.batch, c.tokens});
      for (int64_t i = 0; i < mask.size(); ++i) mask.set(i, random_() % 4 != 0);
    }
    if (!c.borders.empty()) {
      borders = Array(DType::int64, {n + 1});
      for (int64_t i = 0; i <= n; ++i) borders.set(i, static_cast<double>(c.borders[i]));
    }
    if (!c.state) return;
    const auto make = [&] { return StateArrays(c.compute(), n, c.latent_heads, c.latents, c.dim); };
    initial = make(), final = make();
    fill(initial.max), fill(initial.mean);
    for (int64_t i = 0; i < initial.norm.size(); ++i) initial.norm.set(i, 1 + i % 3);
  }

  latte::MacchiatoForward forward_params() const {
    latte::MacchiatoForward p;
    p.q_latent = q_latent.tensor();
    p.latent.k = k_latent.tensor(), p.latent.v = v_latent.tensor();
    p.latent.key_mask = mask.tensor(), p.latent.scale = 0.7;
    p.latent.initial = initial.state(), p.latent.final = final.state();
    // One array where y is unrounded.
    p.latent.y = total.tensor();
    set_window(p.window);
    p.window.y = y.dtype() == total.dtype() ? total.tensor() : y.tensor();
    p.window.log_sum = log_sum.tensor(), p.window.wide = wide.tensor();
    return p;
  }

  template <class Params>
  void set_window(Params& p) const {
    p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor();
    p.key_mask = mask.tensor(), p.cu_seqlens = borders.tensor();
    p.q_sink = q_sink.tensor(), p.k_sink = k_sink.tensor(), p.v_sink = v_sink.tensor();
    p.window = c.window, p.causal = c.causal, p.scale = 0.4;
  }

  // Elements within `factor` roundings of CUDA's products of the type, or of the compute type.
  void close(const char* name, const Array& got, const Array& expected, double factor) const {
    const bool is_half = element_size(c.type) == 2;
    const double units =
        is_half ? 2 * unit_roundoff(c.type) / unit_roundoff(DType::float32) : factor;
    expect_close(name, got.values(), expected.values(), got.dtype(), c.compute(), units);
  }

  void fill(Array& a) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < a.size(); ++i) a.set(i, normal(random_));
  }

  const MacchiatoCase c;
  Array q_latent, k_latent, v_latent, q, k, v, mask, borders, y, total, wide, log_sum;
  Array q_sink, k_sink, v_sink;
  StateArrays initial, final;

 private:
  std::mt19937 random_{1};
};

// On the CPU, in a workspace of its own.
template <class Params>
void run_on_cpu(void (*function)(const Params&, void*, int), const Params& params) {
  std::vector<unsigned char> workspace(latte::workspace_bytes(params, 1));
  function(params, workspace.data(), 1);
}

// Every feature once, alone and with others.
inline std::vector<MacchiatoCase> macchiato_cases() {
  std::vector<MacchiatoCase> cases;
  for (const DType type : {DType::float32, DType::bfloat16, DType::float16}) {
    MacchiatoCase c;
    c.type = type;
    cases.push_back(c);
    c.sinks = 3, c.masked = true, c.state = true;
    cases.push_back(c);
    c.state = false, c.causal = false, c.latents = 40;
    cases.push_back(c);
    c.sinks = 0, c.latents = 0;
    cases.push_back(c);
    c.causal = true, c.latents = 9, c.latent_heads = 4;
    c.batch = 1, c.borders = {0, 20, 20, 90};
    cases.push_back(c);
  }
  return cases;
}

}  // namespace testing_latte
