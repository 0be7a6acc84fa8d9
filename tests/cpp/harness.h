// SPDX-License-Identifier: Apache-2.0
// Makes a problem, runs it through the library in any dtype and layout, compares with reference.h.
#pragma once

#include <doctest/doctest.h>

#include <random>
#include <string>

#include "buffer.h"
#include "latte/latte.h"
#include "reference.h"

namespace latte_test {

using reference::Doubles;
using reference::kInf;
using reference::Problem;
using reference::Solution;

enum class Keys { normal, wide, rising, soaring, falling, jumps, steps, holes, huge };
inline constexpr Keys kEventfulKeys[] = {Keys::wide,  Keys::rising, Keys::soaring, Keys::falling,
                                         Keys::jumps, Keys::steps,  Keys::holes,   Keys::huge};
inline const char* name(Keys keys) {
  constexpr const char* names[] = {"normal", "wide",  "rising", "soaring", "falling",
                                   "jumps",  "steps", "holes",  "huge"};
  return names[static_cast<int>(keys)];
}

// What to test: sizes, features and number formats. Chained setters are not needed: designated
// initialisers name the few fields that a case changes.
struct Case {
  int64_t batch = 1, heads = 2, kv_heads = 2, tokens = 65, latents = 8, dim = 8;
  bool causal = true;
  double scale = 1;
  Keys keys = Keys::normal;
  double logit_size = 1;
  bool masked = false;
  std::vector<int64_t> cu_seqlens = {};
  bool with_initial = false, with_final = true, with_d_final = true, with_d_initial = true;
  DType q = DType::float32, k = DType::float32, v = DType::float32;
  Layout layout = Layout::contiguous;
  unsigned expanded = 0;  // dimensions of q, k, v and dy with stride 0 (bit i)
  int threads = 1;
  unsigned seed = 1;

  DType compute() const { return v == DType::float64 ? DType::float64 : DType::float32; }
  std::string text() const {
    std::string s = "B=" + std::to_string(batch) + " H=" + std::to_string(heads) +
                    " Hk=" + std::to_string(kv_heads) + " T=" + std::to_string(tokens) +
                    " L=" + std::to_string(latents) + " D=" + std::to_string(dim) +
                    (causal ? " causal" : " bidirectional") + " scale=" + std::to_string(scale) +
                    " keys=" + name(keys) + " q=" + name(q) + " k=" + name(k) + " v=" + name(v) +
                    " layout=" + name(layout) + " threads=" + std::to_string(threads);
    if (masked) s += " masked";
    if (with_initial) s += " initial";
    if (expanded) s += " expanded=" + std::to_string(expanded);
    for (const int64_t border : cu_seqlens)
      s += (s.back() == '>' ? "" : " >") + std::to_string(border) + ">";
    return s;
  }
};

inline double key_at(Keys keys, int64_t t, int64_t l, double noise, std::mt19937& random) {
  switch (keys) {
    case Keys::normal:
      return noise;
    case Keys::wide:
      return 1e4 * noise;
    case Keys::rising:
      return noise + static_cast<double>(t);
    case Keys::soaring:
      return noise + 50.0 * static_cast<double>(t);
    case Keys::falling:
      return noise - 50.0 * static_cast<double>(t);
    case Keys::jumps:  // a higher plateau now and then, at different tokens per latent
      return noise + 1e4 * static_cast<double>((t + 3 * l) / 37);
    case Keys::steps:  // rises that just do and just do not exceed the kernel's margin of 16
      return static_cast<double>(t / 9) * (15.5 + static_cast<double>(l % 3) * 0.5);
    case Keys::holes:
      return random() % 3 == 0 || l % 5 == 1 ? -kInf : noise;
    case Keys::huge:
      return random() % 4 == 0 ? (random() % 2 ? 3e38 : -3e38) : noise;
  }
  return 0;
}

inline Problem make_problem(const Case& c) {
  std::mt19937 random(c.seed);
  std::normal_distribution<double> normal;
  Problem p;
  p.batch = c.batch;
  p.heads = c.heads;
  p.kv_heads = c.kv_heads;
  p.tokens = c.tokens;
  p.latents = c.latents;
  p.dim = c.dim;
  p.causal = c.causal;
  p.scale = c.scale;
  p.cu_seqlens = c.cu_seqlens;

  // fill(x, heads, width, f): x[b,h,t,i] = f(t, i), equal along expanded dimensions.
  const auto fill = [&](Doubles& x, int64_t heads, int64_t width, DType dtype, auto f) {
    const int64_t shape[] = {p.batch, heads, p.tokens, width};
    x.resize(p.batch * heads * p.tokens * width);
    for (size_t i = 0; i < x.size(); ++i) {
      int64_t index[4], rest = static_cast<int64_t>(i), first = 0;
      for (int d = 3; d >= 0; rest /= shape[d--]) index[d] = rest % shape[d];
      for (int d = 0; d < 4; ++d) first = first * shape[d] + (c.expanded >> d & 1 ? 0 : index[d]);
      const bool repeated = first != static_cast<int64_t>(i);
      x[i] = repeated ? x[first] : quantise(f(index[2], index[3]), dtype);
    }
  };
  fill(p.q, p.heads, p.latents, c.q, [&](int64_t t, int64_t l) {
    // Now and then an unusable latent, and a row without any.
    if (c.keys == Keys::holes && (t % 7 == 3 || (t + l) % 4 == 0)) return -kInf;
    return c.logit_size * normal(random);
  });
  fill(p.k, p.kv_heads, p.latents, c.k, [&](int64_t t, int64_t l) {
    return key_at(c.keys, t, l, c.logit_size * normal(random), random);
  });
  fill(p.v, p.kv_heads, p.dim, c.v, [&](int64_t, int64_t) { return normal(random); });
  fill(p.dy, p.heads, p.dim, c.v, [&](int64_t, int64_t) { return normal(random); });

  if (c.masked) {
    p.key_mask.resize(p.batch * p.tokens);
    for (int64_t i = 0; i < p.batch * p.tokens; ++i) {
      p.key_mask[i] = random() % 3 != 0;
      if (p.key_mask[i] || c.expanded) continue;
      // A masked token must not be looked at.
      const int64_t b = i / p.tokens, t = i % p.tokens;
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        const int64_t row = (b * p.kv_heads + h) * p.tokens + t;
        for (int64_t l = 0; l < p.latents; ++l) p.k[row * p.latents + l] = l % 2 ? NAN : kInf;
        for (int64_t d = 0; d < p.dim; ++d) p.v[row * p.dim + d] = d % 2 ? kInf : NAN;
      }
    }
  }
  const int64_t states = p.sequences() * p.kv_heads * p.latents;
  if (c.with_initial) {
    auto& s = p.initial.emplace();
    for (int64_t i = 0; i < states; ++i) {
      const bool empty = i % 6 == 4;
      s.max.push_back(empty ? -kInf : quantise(2 * normal(random), c.compute()));
      s.norm.push_back(empty ? 0 : quantise(1 + random() % 100 * 0.37, c.compute()));
      for (int64_t d = 0; d < p.dim; ++d)
        s.mean.push_back(empty ? 0 : quantise(normal(random), c.compute()));
    }
  }
  if (c.with_final && c.with_d_final) {
    auto& s = p.d_final.emplace();
    for (int64_t i = 0; i < states; ++i) {
      s.norm.push_back(quantise(0.1 * normal(random), c.compute()));
      for (int64_t d = 0; d < p.dim; ++d) s.mean.push_back(quantise(normal(random), c.compute()));
    }
  }
  return p;
}

// What the library computed.
struct Outputs {
  Doubles y, final_max, final_norm, final_mean, dq, dk, dv, d_initial_norm, d_initial_mean;
  bool operator==(const Outputs&) const = default;
};

struct StateBuffers {
  Buffer max, norm, mean;
  StateBuffers() = default;
  StateBuffers(DType dtype, int64_t n, int64_t heads, int64_t latents, int64_t dim, Layout layout)
      : max(dtype, {n, heads, latents}, layout),
        norm(dtype, {n, heads, latents}, layout),
        mean(dtype, {n, heads, latents, dim}, layout) {}
  void fill(const reference::State& s) {
    if (!s.max.empty() || max.count() == 0) max.fill(s.max);
    norm.fill(s.norm);
    mean.fill(s.mean);
  }
  latte::State state() { return {max.tensor(), norm.tensor(), mean.tensor()}; }
  bool outside_is_untouched() const {
    return max.outside_is_untouched() && norm.outside_is_untouched() && mean.outside_is_untouched();
  }
  bool is_as_filled() const { return norm.is_as_filled() && mean.is_as_filled(); }
};

// The buffers of one problem and the parameters that point at them.
class Call {
 public:
  Call(const Problem& p, const Case& c)
      : q_(c.q, {p.batch, p.heads, p.tokens, p.latents}, c.layout, c.expanded),
        k_(c.k, {p.batch, p.kv_heads, p.tokens, p.latents}, c.layout, c.expanded),
        v_(c.v, {p.batch, p.kv_heads, p.tokens, p.dim}, c.layout, c.expanded),
        dy_(c.v, {p.batch, p.heads, p.tokens, p.dim}, c.layout, c.expanded),
        y_(c.v, {p.batch, p.heads, p.tokens, p.dim}, c.layout),
        dq_(c.q, {p.batch, p.heads, p.tokens, p.latents}, c.layout),
        dk_(c.k, {p.batch, p.kv_heads, p.tokens, p.latents}, c.layout),
        dv_(c.v, {p.batch, p.kv_heads, p.tokens, p.dim}, c.layout) {
    q_.fill(p.q);
    k_.fill(p.k);
    v_.fill(p.v);
    dy_.fill(p.dy);
    const auto states = [&] {
      return StateBuffers(c.compute(), p.sequences(), p.kv_heads, p.latents, p.dim, c.layout);
    };
    forward.q = backward.q = q_.tensor();
    forward.k = backward.k = k_.tensor();
    forward.v = backward.v = v_.tensor();
    forward.causal = backward.causal = p.causal;
    forward.scale = backward.scale = p.scale;
    if (!p.key_mask.empty()) {
      key_mask_ = Buffer(DType::boolean, {p.batch, p.tokens}, c.layout);
      key_mask_.fill(p.key_mask);
      forward.key_mask = backward.key_mask = key_mask_.tensor();
    }
    if (!p.cu_seqlens.empty()) {
      const auto borders = static_cast<int64_t>(p.cu_seqlens.size());
      cu_seqlens_ = Buffer(c.seed % 2 ? DType::int32 : DType::int64, {borders}, c.layout);
      cu_seqlens_.fill(p.cu_seqlens);
      forward.cu_seqlens = backward.cu_seqlens = cu_seqlens_.tensor();
    }
    if (p.initial) {
      initial_ = states();
      initial_.fill(*p.initial);
      forward.initial = backward.initial = initial_.state();
      if (c.with_d_initial) {
        d_initial_ = states();
        backward.d_initial = d_initial_.state();
        if (c.seed % 2) backward.d_initial.max = {};
      }
    }
    forward.y = y_.tensor();
    if (c.with_final) {
      final_ = states();
      forward.final = final_.state();
    }
    backward.dy = dy_.tensor();
    backward.dq = dq_.tensor();
    backward.dk = dk_.tensor();
    backward.dv = dv_.tensor();
    if (p.d_final) {
      d_final_ = states();
      d_final_.fill(*p.d_final);
      backward.d_final = d_final_.state();
      if (c.seed % 2) backward.d_final.max = {};
    }
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void run_forward(int threads, int64_t misalignment = 0) {
    Workspace workspace(latte::workspace_bytes(forward, threads), misalignment);
    latte::latent_attention_forward(forward, workspace.data(), threads);
    CHECK_MESSAGE(workspace.outside_is_untouched(), "forward wrote outside its workspace");
  }
  void run_backward(int threads, int64_t misalignment = 0) {
    Workspace workspace(latte::workspace_bytes(backward, threads), misalignment);
    latte::latent_attention_backward(backward, workspace.data(), threads);
    CHECK_MESSAGE(workspace.outside_is_untouched(), "backward wrote outside its workspace");
  }
  Outputs outputs() const {
    Outputs o{y_.values(), {}, {}, {}, dq_.values(), dk_.values(), dv_.values(), {}, {}};
    if (forward.final.mean.rank) {
      o.final_max = final_.max.values();
      o.final_norm = final_.norm.values();
      o.final_mean = final_.mean.values();
    }
    if (backward.d_initial.mean.rank) {
      o.d_initial_norm = d_initial_.norm.values();
      o.d_initial_mean = d_initial_.mean.values();
    }
    return o;
  }
  bool outside_is_untouched() const {
    return y_.outside_is_untouched() && dq_.outside_is_untouched() && dk_.outside_is_untouched() &&
           dv_.outside_is_untouched() &&
           (!forward.final.mean.rank || final_.outside_is_untouched()) &&
           (!backward.d_initial.mean.rank || d_initial_.outside_is_untouched());
  }
  bool inputs_are_unchanged() const {
    return q_.is_as_filled() && k_.is_as_filled() && v_.is_as_filled() && dy_.is_as_filled() &&
           key_mask_.is_as_filled() && cu_seqlens_.is_as_filled() &&
           (!forward.initial.mean.rank || initial_.is_as_filled()) &&
           (!backward.d_final.mean.rank || d_final_.is_as_filled());
  }

  latte::LatentAttentionForward forward;
  latte::LatentAttentionBackward backward;

 private:
  Buffer q_, k_, v_, dy_, key_mask_{DType::boolean, {0}}, cu_seqlens_{DType::int32, {0}};
  StateBuffers initial_, d_final_;
  Buffer y_, dq_, dk_, dv_;
  StateBuffers final_, d_initial_;
};

inline Outputs run(const Problem& p, const Case& c) {
  Call call(p, c);
  call.run_forward(c.threads, c.seed);
  call.run_backward(c.threads, c.seed + 8);
  CHECK_MESSAGE(call.outside_is_untouched(), "wrote outside an output: ", c.text());
  CHECK_MESSAGE(call.inputs_are_unchanged(), "wrote to an input: ", c.text());
  return call.outputs();
}

// Rounding errors may reach `tolerance` times the sum of the absolute values of a result's terms,
// plus a thousandth of that for the largest element (terms below the flush-to-zero threshold of
// exp() vanish), plus half a unit in the last place of the storage type.
inline double excess(const Doubles& got, const reference::Reals& expected, DType storage,
                     double tolerance, size_t* where) {
  double largest = 0, worst = 0;
  for (const auto& x : expected) largest = std::max(largest, x.magnitude);
  for (size_t i = 0; i < got.size(); ++i) {
    const double allowed = tolerance * (expected[i].magnitude + 1e-3 * largest) +
                           1.01 * storage_error(storage, expected[i].value);
    const double ratio = std::fabs(got[i] - expected[i].value) / allowed;
    if (!(ratio <= worst)) {  // NaN is the worst
      worst = std::isnan(ratio) ? kInf : ratio;
      *where = i;
    }
  }
  return worst;
}

inline void compare(const char* what, const Doubles& got, const reference::Reals& expected,
                    DType storage, double tolerance, const std::string& text) {
  REQUIRE(got.size() == expected.size());
  size_t where = 0;
  const double worst = excess(got, expected, storage, tolerance, &where);
  if (worst > 1)
    FAIL_CHECK(what << "[" << where << "] is " << got[where] << ", expected "
                    << expected[where].value << ": " << worst << " times the allowed error, "
                    << text);
}

inline double tolerance_of(const Case& c) { return c.compute() == DType::float64 ? 1e-14 : 2e-6; }

inline void compare(const Outputs& got, const Solution& expected, const Case& c) {
  const std::string text = c.text();
  const double tolerance = tolerance_of(c);
  compare("y", got.y, expected.y, c.v, tolerance, text);
  if (c.with_final) {
    CHECK_MESSAGE(got.final_max == expected.final_max, "final.max: ", text);
    compare("final.norm", got.final_norm, expected.final_norm, c.compute(), tolerance, text);
    compare("final.mean", got.final_mean, expected.final_mean, c.compute(), tolerance, text);
  }
  compare("dq", got.dq, expected.dq, c.q, tolerance, text);
  compare("dk", got.dk, expected.dk, c.k, tolerance, text);
  compare("dv", got.dv, expected.dv, c.v, tolerance, text);
  if (c.with_initial && c.with_d_initial) {
    compare("d_initial.norm", got.d_initial_norm, expected.d_initial_norm, c.compute(), tolerance,
            text);
    compare("d_initial.mean", got.d_initial_mean, expected.d_initial_mean, c.compute(), tolerance,
            text);
  }
}

inline void check(const Case& c) {
  const Problem p = make_problem(c);
  compare(run(p, c), reference::solve(p), c);
}

}  // namespace latte_test
