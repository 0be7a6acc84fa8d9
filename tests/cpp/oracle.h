// SPDX-License-Identifier: Apache-2.0
// Latent attention of one key/value head in double, written to be read: every p(s|l,t) is a softmax
// over the visible tokens, computed from scratch for each t and l. O(T^2 L D), no scan, no
// rescaling.
//
// An initial state is a token "before the first" with key log norm + max and, per latent, its own
// value mean[l]; it has index 0 below and token s of the input index s + 1.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace reference {

using Vector = std::vector<double>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Head {
  int64_t tokens = 0, latents = 0, dim = 0, group = 1;
  bool causal = true;
  Vector q;                // (group, tokens, latents), scaled
  Vector k;                // (tokens, latents), scaled, -inf where masked
  Vector v;                // (tokens, dim), 0 where masked
  Vector max, norm, mean;  // (latents), (latents), (latents, dim); the initial state

  // The key and value of index i for latent l.
  double key(int64_t i, int64_t l) const {
    if (i > 0) return k[(i - 1) * latents + l];
    return norm[l] == 0 ? -kInfinity : max[l] + std::log(norm[l]);
  }
  double value(int64_t i, int64_t l, int64_t d) const {
    return i > 0 ? v[(i - 1) * dim + d] : mean[l * dim + d];
  }
};

struct Result {
  Vector y;                // (group, tokens, dim)
  Vector max, norm, mean;  // the final state
};

struct Cotangents {
  Vector y, norm, mean;
};

struct Gradients {
  Vector q, k, v;        // with respect to the scaled q and k
  Vector norm, mean;     // of the initial state
  double key_terms = 0;  // the largest |terms| of an element of k or norm, which may cancel
};

// exp(a - b) with exp(-inf - -inf) = 0: the empty set has no mass.
inline double mass(double a, double b) { return a == -kInfinity ? 0 : std::exp(a - b); }

// p(.|l) over indices [0, count); all zeros if no key is usable.
inline Vector token_probabilities(const Head& head, int64_t count, int64_t l) {
  Vector w(count);
  double top = -kInfinity, sum = 0;
  for (int64_t i = 0; i < count; ++i) top = std::fmax(top, head.key(i, l));
  for (int64_t i = 0; i < count; ++i) sum += w[i] = mass(head.key(i, l), top);
  for (double& x : w) x = sum == 0 ? 0 : x / sum;
  return w;
}

// p(.|t) of query head g.
inline Vector latent_probabilities(const Head& head, int64_t g, int64_t t) {
  const double* q = &head.q[(g * head.tokens + t) * head.latents];
  Vector p(head.latents);
  double top = -kInfinity, sum = 0;
  for (int64_t l = 0; l < head.latents; ++l) top = std::fmax(top, q[l]);
  for (int64_t l = 0; l < head.latents; ++l) sum += p[l] = mass(q[l], top);
  for (double& x : p) x = sum == 0 ? 0 : x / sum;
  return p;
}

// E[v | l] under the probabilities w.
inline Vector expected_value(const Head& head, const Vector& w, int64_t l) {
  Vector mean(head.dim);
  for (size_t i = 0; i < w.size(); ++i)
    if (w[i] != 0)
      for (int64_t d = 0; d < head.dim; ++d) mean[d] += w[i] * head.value(i, l, d);
  return mean;
}

// Indices that token t sees.
inline int64_t visible(const Head& head, int64_t t) {
  return head.causal ? t + 2 : head.tokens + 1;
}

// Calls f(l, t, w, mean) for every latent and token, with w = p(.|l,t) and mean = E[v|l,t].
template <class F>
void for_each_mean(const Head& head, F f) {
  for (int64_t l = 0; l < head.latents; ++l) {
    Vector w, mean;
    for (int64_t t = 0; t < head.tokens; ++t) {
      if (head.causal || t == 0) {
        w = token_probabilities(head, visible(head, t), l);
        mean = expected_value(head, w, l);
      }
      f(l, t, w, mean);
    }
  }
}

inline Vector all_latent_probabilities(const Head& head) {
  Vector all;
  for (int64_t g = 0; g < head.group; ++g)
    for (int64_t t = 0; t < head.tokens; ++t)
      for (const double p : latent_probabilities(head, g, t)) all.push_back(p);
  return all;
}

inline Result forward(const Head& head) {
  const int64_t T = head.tokens, L = head.latents, D = head.dim;
  Result r{Vector(head.group * T * D), Vector(L), Vector(L), Vector(L * D)};
  const Vector p = all_latent_probabilities(head);
  for_each_mean(head, [&](int64_t l, int64_t t, const Vector&, const Vector& mean) {
    for (int64_t g = 0; g < head.group; ++g)
      for (int64_t d = 0; d < D; ++d) r.y[(g * T + t) * D + d] += p[(g * T + t) * L + l] * mean[d];
  });
  for (int64_t l = 0; l < L; ++l) {
    r.max[l] = head.max[l];
    for (int64_t t = 0; t < T; ++t) r.max[l] = std::fmax(r.max[l], head.k[t * L + l]);
    if (head.norm[l] != 0) r.norm[l] = head.norm[l] * mass(head.max[l], r.max[l]);
    for (int64_t t = 0; t < T; ++t) r.norm[l] += mass(head.k[t * L + l], r.max[l]);
    const Vector mean = expected_value(head, token_probabilities(head, T + 1, l), l);
    for (int64_t d = 0; d < D; ++d) r.mean[l * D + d] = mean[d];
  }
  return r;
}

// Vector-Jacobian product: that of a softmax-weighted mean for every (t, l), summed. Both maxima
// are constants, so a change of log norm is norm d_norm, in and out.
inline Gradients backward(const Head& head, const Cotangents& seeds) {
  const int64_t T = head.tokens, L = head.latents, D = head.dim;
  Gradients r{Vector(head.group * T * L), Vector(T * L), Vector(T * D), Vector(L), Vector(L * D)};
  const Vector p = all_latent_probabilities(head);
  Vector dp(p.size()), d_log_norm(L), terms((T + 1) * L);

  // mean = sum_i w_i value_i and dmean: dvalue_i = w_i dmean, dkey_i = w_i <value_i - mean, dmean>.
  const auto mean_vjp = [&](int64_t l, const Vector& w, const Vector& mean, const Vector& dmean) {
    double along = 0;
    for (int64_t d = 0; d < D; ++d) along += mean[d] * dmean[d];
    for (size_t i = 0; i < w.size(); ++i) {
      if (w[i] == 0) continue;
      double dot = 0;
      for (int64_t d = 0; d < D; ++d) {
        dot += head.value(i, l, d) * dmean[d];
        (i > 0 ? r.v[(i - 1) * D + d] : r.mean[l * D + d]) += w[i] * dmean[d];
      }
      (i > 0 ? r.k[(i - 1) * L + l] : d_log_norm[l]) += w[i] * (dot - along);
      terms[i * L + l] += w[i] * (std::fabs(dot) + std::fabs(along));
    }
  };

  // Bidirectional rows share one mean, so their cotangents add up before the product.
  Vector shared(L * D);
  for_each_mean(head, [&](int64_t l, int64_t t, const Vector& w, const Vector& mean) {
    Vector dmean(D);
    for (int64_t g = 0; g < head.group; ++g) {
      const int64_t row = g * T + t;
      for (int64_t d = 0; d < D; ++d) {
        dmean[d] += p[row * L + l] * seeds.y[row * D + d];
        dp[row * L + l] += seeds.y[row * D + d] * mean[d];
      }
    }
    if (head.causal) return mean_vjp(l, w, mean, dmean);
    for (int64_t d = 0; d < D; ++d) shared[l * D + d] += dmean[d];
  });
  const Result state = forward(head);
  for (int64_t l = 0; l < L; ++l) {
    const Vector w = token_probabilities(head, T + 1, l), mean = expected_value(head, w, l);
    Vector dmean(D);
    for (int64_t d = 0; d < D; ++d) dmean[d] = seeds.mean[l * D + d] + shared[l * D + d];
    mean_vjp(l, w, mean, dmean);
    const double seed = state.norm[l] * seeds.norm[l];
    d_log_norm[l] += w[0] * seed;
    for (int64_t t = 0; t < T; ++t) r.k[t * L + l] += w[t + 1] * seed;
    r.norm[l] = head.norm[l] == 0 ? 0 : d_log_norm[l] / head.norm[l];
  }
  for (const double x : terms) r.key_terms = std::fmax(r.key_terms, x);
  for (int64_t row = 0; row < head.group * T; ++row) {
    double along = 0;
    for (int64_t l = 0; l < L; ++l) along += p[row * L + l] * dp[row * L + l];
    for (int64_t l = 0; l < L; ++l) r.q[row * L + l] = p[row * L + l] * (dp[row * L + l] - along);
  }
  return r;
}

}  // namespace reference
