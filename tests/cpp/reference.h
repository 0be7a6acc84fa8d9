// SPDX-License-Identifier: Apache-2.0
// Latent attention in double, token by token: docs/mathematics.md read aloud. It knows nothing of
// chunks, references, vectors or strides, and test_reference.cpp checks it against the O(T^2)
// definition and against finite differences.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

namespace reference {

constexpr double kInf = std::numeric_limits<double>::infinity();

// A number and the sum of the absolute values of its terms: what rounding errors are measured by.
struct Real {
  double value = 0, magnitude = 0;
  Real() = default;
  Real(double x) : value(x), magnitude(std::fabs(x)) {}  // NOLINT(google-explicit-constructor)
  Real(double x, double m) : value(x), magnitude(m) {}
};
inline Real operator+(Real a, Real b) { return {a.value + b.value, a.magnitude + b.magnitude}; }
inline Real operator-(Real a, Real b) { return {a.value - b.value, a.magnitude + b.magnitude}; }
inline Real operator*(Real a, Real b) { return {a.value * b.value, a.magnitude * b.magnitude}; }
inline Real& operator+=(Real& a, Real b) { return a = a + b; }

using Doubles = std::vector<double>;
using Reals = std::vector<Real>;

struct State {
  Doubles max, norm, mean;  // (N,Hk,L), (N,Hk,L), (N,Hk,L,D)
};

// Dense row-major arrays with the shapes of latte.h.
struct Problem {
  int64_t batch = 1, heads = 1, kv_heads = 1, tokens = 1, latents = 1, dim = 1;
  bool causal = true;
  double scale = 1;
  Doubles q, k, v, dy;
  std::vector<char> key_mask;       // (B,T), empty: absent
  std::vector<int64_t> cu_seqlens;  // empty: absent
  std::optional<State> initial;     // causal only
  std::optional<State> d_final;     // its max is not used

  int64_t sequences() const {
    return cu_seqlens.empty() ? batch : static_cast<int64_t>(cu_seqlens.size()) - 1;
  }
  int64_t group() const { return heads / kv_heads; }
};

struct Solution {
  Reals y;
  Doubles final_max;
  Reals final_norm, final_mean;
  Reals dq, dk, dv;
  Reals d_initial_norm, d_initial_mean;
};

// Tokens [first, first + count) of one row of the batch are one sequence.
struct Sequence {
  int64_t batch, first, count;
};
inline Sequence sequence(const Problem& p, int64_t n) {
  if (p.cu_seqlens.empty()) return {n, 0, p.tokens};
  return {0, p.cu_seqlens[n], p.cu_seqlens[n + 1] - p.cu_seqlens[n]};
}

// softmax of one row of q; a row of -inf has no usable latent and gives zeros.
inline Doubles latent_weights(const double* q, int64_t latents, double scale) {
  double top = -kInf, sum = 0;
  for (int64_t l = 0; l < latents; ++l) top = std::max(top, q[l] * scale);
  Doubles p(latents, 0.0);
  if (top == -kInf) return p;
  for (int64_t l = 0; l < latents; ++l) sum += p[l] = std::exp(q[l] * scale - top);
  for (double& x : p) x /= sum;
  return p;
}

// The states of one key/value head: state i is that after i tokens. alpha and keep are the weights
// with which token t and state t enter state t + 1.
struct Scan {
  Doubles max, norm, alpha, keep;
  Reals mean;
};
inline Scan scan(const Problem& p, int64_t n, int64_t head) {
  const auto [b, first, count] = sequence(p, n);
  const int64_t L = p.latents, D = p.dim, state = n * p.kv_heads + head;
  Scan s;
  s.max.assign((count + 1) * L, -kInf);
  s.norm.assign((count + 1) * L, 0.0);
  s.mean.assign((count + 1) * L * D, Real());
  s.alpha.assign(count * L, 0.0);
  s.keep.assign(count * L, 0.0);
  if (p.initial) {
    for (int64_t l = 0; l < L; ++l) {
      s.max[l] = p.initial->max[state * L + l];
      s.norm[l] = p.initial->norm[state * L + l];
      for (int64_t d = 0; d < D; ++d) s.mean[l * D + d] = p.initial->mean[(state * L + l) * D + d];
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    const bool real = p.key_mask.empty() || p.key_mask[b * p.tokens + first + t];
    const int64_t row = (b * p.kv_heads + head) * p.tokens + first + t;
    for (int64_t l = 0; l < L; ++l) {
      const int64_t old = t * L + l, now = old + L;
      const double key = real ? p.k[row * L + l] * p.scale : -kInf;
      s.max[now] = std::max(s.max[old], key);
      const double kept = s.norm[old] == 0 ? 0 : s.norm[old] * std::exp(s.max[old] - s.max[now]);
      const double added = key == -kInf ? 0 : std::exp(key - s.max[now]);
      s.norm[now] = kept + added;
      if (s.norm[now] == 0) continue;
      s.alpha[old] = added / s.norm[now];
      s.keep[old] = kept / s.norm[now];
      for (int64_t d = 0; d < D; ++d) {
        const Real value = added == 0 ? 0 : p.v[row * D + d];
        s.mean[now * D + d] = Real(s.keep[old]) * s.mean[old * D + d] + Real(s.alpha[old]) * value;
      }
    }
  }
  return s;
}

inline Real dot(const Real* a, const double* b, int64_t n) {
  Real sum;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * Real(b[i]);
  return sum;
}

inline void forward_head(const Problem& p, int64_t n, int64_t head, const Scan& s, Solution& out) {
  const auto [b, first, count] = sequence(p, n);
  const int64_t L = p.latents, D = p.dim;
  for (int64_t g = 0; g < p.group(); ++g) {
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = (b * p.heads + head * p.group() + g) * p.tokens + first + t;
      const Doubles weights = latent_weights(&p.q[row * L], L, p.scale);
      const Real* mean = &s.mean[(p.causal ? t + 1 : count) * L * D];
      for (int64_t l = 0; l < L; ++l)
        for (int64_t d = 0; d < D; ++d) out.y[row * D + d] += Real(weights[l]) * mean[l * D + d];
    }
  }
  const int64_t state = n * p.kv_heads + head;
  for (int64_t l = 0; l < L; ++l) {
    out.final_max[state * L + l] = s.max[count * L + l];
    out.final_norm[state * L + l] = s.norm[count * L + l];
    for (int64_t d = 0; d < D; ++d)
      out.final_mean[(state * L + l) * D + d] = s.mean[(count * L + l) * D + d];
  }
}

// G_t = sum_heads p_t (x) dy_t + f_(t+1) G_(t+1),  c_t = sum_heads p_t dP_t + f_(t+1) c_(t+1).
inline void backward_head(const Problem& p, int64_t n, int64_t head, const Scan& s, Solution& out) {
  const auto [b, first, count] = sequence(p, n);
  const int64_t L = p.latents, D = p.dim, state = n * p.kv_heads + head;
  Reals G(L * D), c(L);
  if (p.d_final) {
    for (int64_t l = 0; l < L; ++l) {
      const double* d_mean = &p.d_final->mean[(state * L + l) * D];
      for (int64_t d = 0; d < D; ++d) G[l * D + d] = d_mean[d];
      const Real d_lse = Real(s.norm[count * L + l]) * Real(p.d_final->norm[state * L + l]);
      c[l] = dot(&s.mean[(count * L + l) * D], d_mean, D) - d_lse;
    }
  }
  for (int64_t t = count - 1; t >= 0; --t) {
    // The query rows that read the state after token t.
    const int64_t begin = p.causal || t < count - 1 ? t : 0;
    const int64_t end = p.causal || t == count - 1 ? t + 1 : begin;
    for (int64_t g = 0; g < p.group(); ++g) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t row = (b * p.heads + head * p.group() + g) * p.tokens + first + r;
        const Doubles weights = latent_weights(&p.q[row * L], L, p.scale);
        const double* dy = &p.dy[row * D];
        Reals d_weights(L);
        Real average;
        for (int64_t l = 0; l < L; ++l) {
          d_weights[l] = dot(&s.mean[((t + 1) * L + l) * D], dy, D);
          average += Real(weights[l]) * d_weights[l];
        }
        for (int64_t l = 0; l < L; ++l) {
          out.dq[row * L + l] = Real(weights[l] * p.scale) * (d_weights[l] - average);
          c[l] += Real(weights[l]) * d_weights[l];
          for (int64_t d = 0; d < D; ++d) G[l * D + d] += Real(weights[l]) * Real(dy[d]);
        }
      }
    }
    const int64_t row = (b * p.kv_heads + head) * p.tokens + first + t;
    for (int64_t l = 0; l < L; ++l) {
      const double alpha = s.alpha[t * L + l], keep = s.keep[t * L + l];
      if (alpha != 0) {
        for (int64_t d = 0; d < D; ++d) out.dv[row * D + d] += Real(alpha) * G[l * D + d];
        out.dk[row * L + l] = Real(alpha * p.scale) * (dot(&G[l * D], &p.v[row * D], D) - c[l]);
      }
      c[l] = Real(keep) * c[l];
      for (int64_t d = 0; d < D; ++d) G[l * D + d] = Real(keep) * G[l * D + d];
    }
  }
  if (!p.initial) return;
  for (int64_t l = 0; l < L; ++l) {
    const double norm = p.initial->norm[state * L + l];
    if (norm == 0) continue;  // an empty latent has no gradient
    const Real d_lse = dot(&G[l * D], &p.initial->mean[(state * L + l) * D], D) - c[l];
    out.d_initial_norm[state * L + l] = Real(1 / norm) * d_lse;
    for (int64_t d = 0; d < D; ++d) out.d_initial_mean[(state * L + l) * D + d] = G[l * D + d];
  }
}

// Everything the library computes: values, states and (if p.dy is there) gradients.
inline Solution solve(const Problem& p) {
  const int64_t states = p.sequences() * p.kv_heads * p.latents;
  Solution out;
  out.y.resize(p.batch * p.heads * p.tokens * p.dim);
  out.final_max.resize(states);
  out.final_norm.resize(states);
  out.final_mean.resize(states * p.dim);
  out.dq.resize(p.q.size());
  out.dk.resize(p.k.size());
  out.dv.resize(p.v.size());
  out.d_initial_norm.resize(states);
  out.d_initial_mean.resize(states * p.dim);
  for (int64_t n = 0; n < p.sequences(); ++n) {
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      const Scan s = scan(p, n, head);
      forward_head(p, n, head, s, out);
      if (!p.dy.empty()) backward_head(p, n, head, s, out);
    }
  }
  return out;
}

// merge(a, b) of two states.
inline State merge(const State& a, const State& b) {
  State out = a;
  const size_t dim = a.max.empty() ? 0 : a.mean.size() / a.max.size();
  for (size_t i = 0; i < a.max.size(); ++i) {
    out.max[i] = std::max(a.max[i], b.max[i]);
    const double from_a = a.norm[i] == 0 ? 0 : a.norm[i] * std::exp(a.max[i] - out.max[i]);
    const double from_b = b.norm[i] == 0 ? 0 : b.norm[i] * std::exp(b.max[i] - out.max[i]);
    out.norm[i] = from_a + from_b;
    for (size_t d = i * dim; d < (i + 1) * dim; ++d)
      out.mean[d] = out.norm[i] == 0 ? 0 : (from_a * a.mean[d] + from_b * b.mean[d]) / out.norm[i];
  }
  return out;
}

}  // namespace reference
