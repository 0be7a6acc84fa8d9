// SPDX-License-Identifier: Apache-2.0
// A random call of the library and its check against oracle.h.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "arrays.h"
#include "backend.h"
#include "oracle.h"

namespace testing_latte {

using reference::kInfinity;

enum class Keys {
  normal,
  rising,    // the maximum moves at every token
  climbing,  // by up to 90 at tokens of its own per latent
  falling,   // only the first token keeps its weight for long
  jumps,     // by 1e4, up and down
  infinite,  // -inf: single keys, leading tokens, whole latents, whole query rows
  huge       // close to the largest finite float
};

struct Case {
  int64_t batch = 1, heads = 1, kv_heads = 1, tokens = 17, latents = 5, dim = 6;
  DType q_type = DType::float32, k_type = DType::float32, v_type = DType::float32;
  bool causal = true, masked = false, initial = false, states = true;
  double scale = 1;
  Layout q_layout = Layout::contiguous, k_layout = Layout::contiguous,
         v_layout = Layout::contiguous, y_layout = Layout::contiguous,
         state_layout = Layout::contiguous;
  std::vector<int64_t> borders;  // of packed sequences, empty if not packed
  DType border_type = DType::int64;
  Keys keys = Keys::normal;
  int threads = 1;
  unsigned seed = 1;

  void set_type(DType dtype) { q_type = k_type = v_type = dtype; }
  void set_layout(Layout layout) {
    q_layout = k_layout = v_layout = layout;
    if (!is_expanded(layout)) y_layout = state_layout = layout;
  }
  DType compute_type() const { return q_type == DType::float64 ? DType::float64 : DType::float32; }
  int64_t sequences() const {
    return borders.empty() ? batch : static_cast<int64_t>(borders.size()) - 1;
  }
  std::string text() const {
    std::ostringstream s;
    s << "B=" << batch << " H=" << heads << " Hk=" << kv_heads << " T=" << tokens
      << " L=" << latents << " D=" << dim << " types=" << name_of(q_type) << "," << name_of(k_type)
      << "," << name_of(v_type) << " layouts=" << int(q_layout) << int(k_layout) << int(v_layout)
      << int(y_layout) << int(state_layout) << (causal ? " causal" : " bidirectional")
      << (masked ? " masked" : "") << (initial ? " initial" : "") << (states ? " states" : "")
      << " scale=" << scale << " keys=" << int(keys) << " packed=" << borders.size()
      << " threads=" << threads << " seed=" << seed;
    return s.str();
  }
};

// Runs a call in a workspace of exactly the promised size, poisoned, at an odd address.
template <class Params>
void run(const Params& params, int threads, int64_t offset = 1) {
  constexpr int64_t kGuard = 256;
  constexpr bool kStep = std::is_same_v<Params, latte::LatentAttentionStep>;
  // float64, which latte/cuda.h has not, the CPU computes: what other calls are compared with.
  const bool on_cpu = !kStep && params.q.dtype == DType::float64;
  const int64_t bytes =
      on_cpu ? latte::workspace_bytes(params, threads) : workspace_size(params, threads);
  ASSERT_GE(bytes, 0);
  std::vector<unsigned char> memory(bytes + 2 * kGuard, 0xFF);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  int64_t start = kGuard / 2 + (64 - address % 64) % 64 + offset;
  unsigned char* const workspace = memory.data() + start;
  if constexpr (std::is_same_v<Params, latte::LatentAttentionForward>) {
    on_cpu ? latte::latent_attention_forward(params, workspace, threads)
           : call(backend::latent_attention_forward, params, workspace, threads);
  } else if constexpr (kStep) {
    call(backend::latent_attention_step, params, workspace, threads);
  } else {
    on_cpu ? latte::latent_attention_backward(params, workspace, threads)
           : call(backend::latent_attention_backward, params, workspace, threads);
  }
  for (int64_t i = 0; i < static_cast<int64_t>(memory.size()); ++i)
    if ((i < start || i >= start + bytes) && memory[i] != 0xFF)
      FAIL() << "workspace of " << bytes << " bytes written at byte " << i - start;
}

// Every element within `factor` roundings of the compute type relative to the largest expected one
// (at least `largest`), plus one rounding to the array's own type.
inline void expect_close(const char* name, const std::vector<double>& got,
                         const std::vector<double>& expected, DType stored, DType compute,
                         double factor, double largest = 1) {
  ASSERT_EQ(got.size(), expected.size()) << name;
  for (const double x : expected)
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  const double tiny = stored == DType::float16 ? 0x1p-25 : 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] == expected[i]) continue;  // infinities too
    const double allowed = factor * unit_roundoff(compute) * largest +
                           1.01 * unit_roundoff(stored) * std::fabs(expected[i]) + tiny;
    const double error = std::fabs(got[i] - expected[i]);
    if (!(error <= allowed)) {
      ADD_FAILURE() << name << "[" << i << "] is " << got[i] << ", expected " << expected[i]
                    << " within " << allowed;
      return;
    }
  }
}

class Call {
 public:
  static constexpr double kForwardFactor = 60, kBackwardFactor = 400;

  // CUDA rounds the factors of its products of half precision, bfloat16 or the 11 bits of TF32, and
  // there are four in a row: weights, 1 / normaliser, scores and the state.
  double forward_factor() const { return factor(kForwardFactor, 2); }
  // Backward there are six: scores of dy and v, r, r dp and the state's gradient as well.
  double backward_factor() const { return factor(kBackwardFactor, 4); }

  explicit Call(const Case& shape) : c(shape), random_(shape.seed) {
    const int64_t n = c.sequences();
    q = Array(c.q_type, {c.batch, c.heads, c.tokens, c.latents}, c.q_layout);
    k = Array(c.k_type, {c.batch, c.kv_heads, c.tokens, c.latents}, c.k_layout);
    v = Array(c.v_type, {c.batch, c.kv_heads, c.tokens, c.dim}, c.v_layout);
    y = Array(c.v_type, {c.batch, c.heads, c.tokens, c.dim}, c.y_layout);
    dy = Array(c.v_type, {c.batch, c.heads, c.tokens, c.dim}, c.y_layout);
    dq = Array(c.q_type, {c.batch, c.heads, c.tokens, c.latents}, c.y_layout);
    dk = Array(c.k_type, {c.batch, c.kv_heads, c.tokens, c.latents}, c.y_layout);
    dv = Array(c.v_type, {c.batch, c.kv_heads, c.tokens, c.dim}, c.y_layout);
    fill(q), fill(v), fill(dy), fill(k);
    fill_keys();
    if (c.masked) mask_tokens();
    if (!c.borders.empty()) {
      borders = Array(c.border_type, {n + 1});
      for (int64_t i = 0; i <= n; ++i) borders.set(i, static_cast<double>(c.borders[i]));
    }
    const auto make = [&](bool with_max) {
      return StateArrays(c.compute_type(), n, c.kv_heads, c.latents, c.dim, c.state_layout,
                         with_max);
    };
    if (c.initial) {
      initial = make(true);
      d_initial = make(false);
      fill_initial();
    }
    if (c.states) {
      final = make(true);
      d_final = make(false);
      fill(d_final.norm), fill(d_final.mean);
      for (int64_t i = 0; i < d_final.norm.size(); ++i)
        d_final.norm.set(i, d_final.norm.get(i) / static_cast<double>(c.tokens + 1));
    }
  }

  latte::LatentAttentionForward forward_params() const {
    latte::LatentAttentionForward p;
    p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor();
    p.key_mask = mask.tensor(), p.cu_seqlens = borders.tensor();
    p.initial = initial.state(), p.final = final.state(), p.y = y.tensor();
    p.causal = c.causal, p.scale = c.scale;
    return p;
  }
  // Of a case with one token: (B, H, T, C) without T is the (N, H, C) of a step.
  latte::LatentAttentionStep step_params() const {
    const auto token = [](latte::Tensor t) {
      t.rank = 3;
      t.shape[2] = t.shape[3], t.stride[2] = t.stride[3];
      return t;
    };
    latte::LatentAttentionStep p;
    p.q = token(q.tensor()), p.k = token(k.tensor());
    p.v = token(v.tensor()), p.y = token(y.tensor());
    p.state = initial.state();
    return p;
  }
  latte::LatentAttentionBackward backward_params() const {
    latte::LatentAttentionBackward p;
    p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor();
    p.key_mask = mask.tensor(), p.cu_seqlens = borders.tensor();
    p.initial = initial.state(), p.dy = dy.tensor();
    p.dq = dq.tensor(), p.dk = dk.tensor(), p.dv = dv.tensor();
    p.d_final = d_final.state(), p.d_initial = d_initial.state();
    p.causal = c.causal, p.scale = c.scale;
    return p;
  }
  void forward() { run(forward_params(), c.threads); }
  void backward() { run(backward_params(), c.threads); }

  void check_forward() {
    SCOPED_TRACE(c.text());
    const auto inputs = input_bytes();
    ASSERT_NO_THROW(forward());
    EXPECT_EQ(input_bytes(), inputs) << "an input was written";
    EXPECT_TRUE(y.intact() && final.intact()) << "bytes outside the outputs were written";
    for_each_head([&](int64_t n, int64_t h, const reference::Head& head) {
      const reference::Result expected = reference::forward(head);
      close("y", rows(y, n, h, c.heads), expected.y, y, forward_factor());
      if (!c.states) return;
      close("max", slice(final.max, n, h), expected.max, final.max, 1);
      close("norm", slice(final.norm, n, h), expected.norm, final.norm, forward_factor());
      close("mean", slice(final.mean, n, h), expected.mean, final.mean, forward_factor());
    });
  }

  void check_backward() {
    SCOPED_TRACE(c.text());
    const auto inputs = input_bytes();
    ASSERT_NO_THROW(backward());
    EXPECT_EQ(input_bytes(), inputs) << "an input was written";
    EXPECT_TRUE(dq.intact() && dk.intact() && dv.intact() && d_initial.intact())
        << "bytes outside the outputs were written";
    for_each_head([&](int64_t n, int64_t h, const reference::Head& head) {
      reference::Cotangents seeds{rows(dy, n, h, c.heads), reference::Vector(c.latents),
                                  reference::Vector(c.latents * c.dim)};
      if (c.states) seeds.norm = slice(d_final.norm, n, h), seeds.mean = slice(d_final.mean, n, h);
      reference::Gradients expected = reference::backward(head, seeds);
      for (double& x : expected.q) x *= c.scale;
      for (double& x : expected.k) x *= c.scale;
      close("dq", rows(dq, n, h, c.heads), expected.q, dq, backward_factor());
      // Where one key has all the weight dk is what is left of terms that cancel, which CUDA sums
      // up apart from each other.
      const double terms = kTestsCuda ? std::fmax(1, expected.key_terms) : 1;
      close("dk", rows(dk, n, h, c.kv_heads), expected.k, dk, backward_factor(), terms);
      close("dv", rows(dv, n, h, c.kv_heads), expected.v, dv, backward_factor());
      if (!c.initial) return;
      close("d_norm", slice(d_initial.norm, n, h), expected.norm, d_initial.norm, backward_factor(),
            terms);
      close("d_mean", slice(d_initial.mean, n, h), expected.mean, d_initial.mean,
            backward_factor());
    });
  }

  // Rows of sequence n of the heads of key/value head h, in a (B, heads, T, C) array.
  std::vector<double> rows(const Array& a, int64_t n, int64_t h, int64_t heads) const {
    const int64_t group = heads / c.kv_heads, width = a.tensor().shape[3];
    std::vector<double> all;
    for (int64_t g = 0; g < group; ++g)
      for (int64_t t = first(n); t < first(n) + tokens(n); ++t)
        for (int64_t i = 0; i < width; ++i)
          all.push_back(a.get(((batch(n) * heads + h * group + g) * c.tokens + t) * width + i));
    return all;
  }
  std::vector<double> slice(const Array& a, int64_t n, int64_t h) const {
    const int64_t count = c.latents * (a.tensor().rank == 4 ? c.dim : 1);
    std::vector<double> all(count);
    for (int64_t i = 0; i < count; ++i) all[i] = a.get((n * c.kv_heads + h) * count + i);
    return all;
  }

  std::vector<unsigned char> output_bytes() const {
    std::vector<unsigned char> all;
    for (const Array* a : {&y, &final.max, &final.norm, &final.mean, &dq, &dk, &dv, &d_initial.norm,
                           &d_initial.mean})
      append(all, *a);
    return all;
  }

  void fill(Array& a) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < a.size(); ++i) a.set(i, normal(random_));
  }

  const Case c;
  Array q, k, v, mask, borders, y, dy, dq, dk, dv;
  StateArrays initial, final, d_final, d_initial;

 private:
  bool is_rounded() const {
    return kTestsCuda && c.q_type == c.k_type && c.k_type == c.v_type &&
           element_size(c.v_type) == 2;
  }
  double factor(double exact, double half) const {
    return is_rounded() ? half * unit_roundoff(c.v_type) / unit_roundoff(DType::float32) : exact;
  }
  int64_t batch(int64_t n) const { return c.borders.empty() ? n : 0; }
  int64_t first(int64_t n) const { return c.borders.empty() ? 0 : c.borders[n]; }
  int64_t tokens(int64_t n) const {
    return c.borders.empty() ? c.tokens : c.borders[n + 1] - c.borders[n];
  }
  double uniform() { return std::uniform_real_distribution<double>()(random_); }

  void fill_keys() {
    if (c.keys == Keys::normal) return;
    const int64_t rows = c.batch * c.kv_heads;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t l = 0; l < c.latents; ++l) {
        double level = 0;
        const int64_t blind = static_cast<int64_t>(uniform() * static_cast<double>(c.tokens + 9));
        for (int64_t t = 0; t < c.tokens; ++t) {
          const int64_t i = (r * c.tokens + t) * c.latents + l;
          const double at = static_cast<double>(t);
          if (c.keys == Keys::rising) k.set(i, k.get(i) + (l % 2 ? 3 : 20) * at);
          if (c.keys == Keys::climbing) {
            if (uniform() < 0.1) level += 90 * uniform();
            k.set(i, k.get(i) + level);
          }
          if (c.keys == Keys::falling) k.set(i, k.get(i) - (l % 2 ? 3 : 20) * at);
          if (c.keys == Keys::jumps) {
            if (uniform() < 0.1)
              level = std::clamp(level + (uniform() < 0.5 ? -1e4 : 1e4), -3e4, 3e4);
            k.set(i, k.get(i) + level);
          }
          if (c.keys == Keys::infinite && (t < blind || uniform() < 0.3)) k.set(i, -kInfinity);
          if (c.keys == Keys::huge && uniform() < 0.3) k.set(i, uniform() < 0.5 ? 3e38 : -3e38);
        }
      }
    for (int64_t i = 0; i < q.size(); ++i) {
      const bool whole_row = i / c.latents % 5 == 3;
      if (c.keys == Keys::infinite && (whole_row || uniform() < 0.2)) q.set(i, -kInfinity);
      if (c.keys == Keys::huge && uniform() < 0.1) q.set(i, uniform() < 0.5 ? 3e38 : -3e38);
    }
  }

  // NaN and infinity under the mask must not spread.
  void mask_tokens() {
    mask = Array(DType::boolean, {c.batch, c.tokens},
                 is_expanded(c.q_layout) ? Layout::contiguous : c.q_layout);
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t t = 0; t < c.tokens; ++t) {
        const bool kept = uniform() < 0.6;
        mask.set(b * c.tokens + t, kept);
        if (kept) continue;
        for (int64_t h = 0; h < c.kv_heads; ++h) {
          const int64_t row = (b * c.kv_heads + h) * c.tokens + t;
          if (!is_expanded(c.k_layout))
            for (int64_t l = 0; l < c.latents; ++l) k.set(row * c.latents + l, std::nan(""));
          if (!is_expanded(c.v_layout))
            for (int64_t d = 0; d < c.dim; ++d)
              v.set(row * c.dim + d, d % 2 ? std::nan("") : kInfinity);
        }
      }
  }

  // Two latents of three hold tokens, the third is empty.
  void fill_initial() {
    fill(initial.max), fill(initial.mean);
    for (int64_t i = 0; i < initial.norm.size(); ++i) {
      initial.norm.set(i, 1 + 3 * uniform());
      if (i % 3 != 2) continue;
      initial.max.set(i, -kInfinity);
      initial.norm.set(i, 0);
      for (int64_t d = 0; d < c.dim; ++d) initial.mean.set(i * c.dim + d, 0);
    }
  }

  template <class F>
  void for_each_head(F f) const {
    for (int64_t n = 0; n < c.sequences(); ++n)
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        SCOPED_TRACE("sequence " + std::to_string(n) + ", key/value head " + std::to_string(h));
        reference::Head head;
        head.tokens = tokens(n), head.latents = c.latents, head.dim = c.dim;
        head.group = c.heads / c.kv_heads, head.causal = c.causal;
        head.q = rows(q, n, h, c.heads);
        head.k = rows(k, n, h, c.kv_heads);
        head.v = rows(v, n, h, c.kv_heads);
        for (double& x : head.q) x *= c.scale;
        for (double& x : head.k) x *= c.scale;
        for (int64_t t = 0; t < head.tokens && mask.present(); ++t)
          if (mask.get(batch(n) * c.tokens + first(n) + t) == 0) {
            std::fill_n(head.k.begin() + t * c.latents, c.latents, -kInfinity);
            std::fill_n(head.v.begin() + t * c.dim, c.dim, 0);
          }
        head.max.assign(c.latents, -kInfinity);
        head.norm.assign(c.latents, 0);
        head.mean.assign(c.latents * c.dim, 0);
        if (c.initial) {
          head.max = slice(initial.max, n, h);
          head.norm = slice(initial.norm, n, h);
          head.mean = slice(initial.mean, n, h);
        }
        f(n, h, head);
      }
  }

  void close(const char* name, const std::vector<double>& got, const std::vector<double>& expected,
             const Array& a, double factor, double largest = 1) const {
    expect_close(name, got, expected, a.dtype(), c.compute_type(), factor, largest);
  }

  static void append(std::vector<unsigned char>& all, const Array& a) {
    const auto bytes = a.bytes();
    all.insert(all.end(), bytes.begin(), bytes.end());
  }
  std::vector<unsigned char> input_bytes() const {
    std::vector<unsigned char> all;
    for (const Array* a : {&q, &k, &v, &mask, &borders, &dy, &initial.max, &initial.norm,
                           &initial.mean, &d_final.norm, &d_final.mean})
      append(all, *a);
    return all;
  }

  std::mt19937 random_;
};

// The cases that forward and backward share.
constexpr int64_t kSizes[] = {1, 2, 3, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 43, 64, 65};
constexpr int64_t kTokens[] = {0, 1, 2, 63, 64, 65, 129};
constexpr DType kTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

// Every pair of L and D; T, dtype and direction are drawn.
inline std::vector<Case> size_cases() {
  std::vector<Case> cases;
  std::mt19937 random(7);
  for (const int64_t latents : kSizes)
    for (const int64_t dim : kSizes) {
      Case c;
      c.latents = latents, c.dim = dim;
      c.tokens = kTokens[random() % 7];
      c.set_type(kTypes[random() % 4]);
      c.causal = random() % 2;
      c.initial = c.causal && random() % 2;
      c.states = random() % 4 != 0;
      c.seed = static_cast<unsigned>(cases.size());
      cases.push_back(c);
    }
  return cases;
}

// Every T, dtype and direction at a few sizes.
inline std::vector<Case> token_cases() {
  std::vector<Case> cases;
  for (const int64_t tokens : kTokens)
    for (const DType dtype : kTypes)
      for (const bool causal : {true, false}) {
        Case c;
        c.batch = 2, c.heads = 4, c.kv_heads = 2, c.tokens = tokens;
        c.latents = 9, c.dim = 17, c.causal = causal, c.initial = causal, c.scale = 0.7;
        c.set_type(dtype);
        cases.push_back(c);
      }
  return cases;
}

inline std::vector<Case> mixed_type_cases() {
  std::vector<Case> cases;
  for (const DType q : {DType::float32, DType::bfloat16, DType::float16})
    for (const DType k : {DType::float32, DType::bfloat16, DType::float16})
      for (const DType v : {DType::float32, DType::bfloat16, DType::float16}) {
        Case c;
        c.q_type = q, c.k_type = k, c.v_type = v;
        c.tokens = 70, c.latents = 11, c.dim = 19, c.causal = cases.size() % 2;
        cases.push_back(c);
      }
  return cases;
}

inline std::vector<Case> layout_cases() {
  std::vector<Case> cases;
  for (int layout = 0; layout <= static_cast<int>(Layout::expanded_channels); ++layout)
    for (const DType dtype : kTypes)
      for (const bool causal : {true, false})
        for (const bool mixed : {false, true}) {
          Case c;
          c.batch = 2, c.heads = 2, c.kv_heads = mixed ? 2 : 1, c.tokens = 67;
          c.latents = 16, c.dim = mixed ? 16 : 11, c.causal = causal, c.initial = causal;
          c.masked = mixed;
          c.set_type(dtype);
          c.set_layout(static_cast<Layout>(layout));
          if (mixed) {
            c.k_layout = static_cast<Layout>((layout + 2) % 9);
            c.v_layout = static_cast<Layout>((layout + 5) % 9);
            c.y_layout = static_cast<Layout>((layout + 1) % 6);
          }
          cases.push_back(c);
        }
  return cases;
}

inline std::vector<Case> event_cases() {
  std::vector<Case> cases;
  for (const Keys keys :
       {Keys::rising, Keys::climbing, Keys::falling, Keys::jumps, Keys::infinite, Keys::huge})
    for (const DType dtype : kTypes)
      for (const bool causal : {true, false})
        for (const int64_t latents : {3, 16, 33}) {
          Case c;
          if (keys == Keys::huge && dtype == DType::float16) continue;
          c.keys = keys, c.causal = causal, c.latents = latents;
          c.heads = 2, c.tokens = 129, c.dim = 10, c.initial = causal && latents != 16;
          c.masked = latents == 33;
          c.set_type(dtype);
          cases.push_back(c);
        }
  return cases;
}

inline std::vector<Case> packed_cases() {
  std::vector<Case> cases;
  for (const DType dtype : kTypes)
    for (const bool causal : {true, false})
      for (const bool masked : {false, true}) {
        Case c;
        c.borders = {0, 0, 1, 66, 66, 66, 130, 133, 133};
        c.border_type = masked ? DType::int32 : DType::int64;
        c.tokens = 133, c.heads = 2, c.latents = 10, c.dim = 9;
        c.causal = causal, c.initial = causal, c.masked = masked;
        c.set_type(dtype);
        cases.push_back(c);
      }
  Case none;  // no sequence at all
  none.borders = {0};
  none.tokens = 0;
  cases.push_back(none);
  return cases;
}

inline std::vector<Case> group_cases() {
  std::vector<Case> cases;
  for (const int64_t kv_heads : {1, 2, 6})
    for (const bool causal : {true, false})
      for (const bool initial : {true, false}) {
        Case c;
        c.batch = 2, c.heads = 6, c.kv_heads = kv_heads, c.tokens = 66;
        c.latents = 7, c.dim = 8, c.causal = causal, c.initial = causal && initial;
        c.masked = !initial;
        cases.push_back(c);
      }
  return cases;
}

inline std::vector<Case> odd_cases() {
  std::vector<Case> cases;
  Case c;
  c.batch = 0;
  cases.push_back(c);
  c = Case();
  for (const double scale : {0.125, -2.0, 0.0}) {
    c.scale = scale, c.tokens = 70, c.initial = true;
    cases.push_back(c);
  }
  return cases;
}

}  // namespace testing_latte
