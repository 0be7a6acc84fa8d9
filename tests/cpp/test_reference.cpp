// SPDX-License-Identifier: Apache-2.0
// The reference against definitions that share no code with it.
#include "harness.h"

using namespace latte_test;  // NOLINT(google-build-using-namespace)
using reference::solve;

namespace {

// y_t = sum_s sum_l p(l|t) p(s|l,t) v_s, straight from the definition, in O(T^2).
Doubles definition(const Problem& p) {
  Doubles y(p.batch * p.heads * p.tokens * p.dim, 0.0);
  for (int64_t n = 0; n < p.sequences(); ++n) {
    const auto [b, first, count] = reference::sequence(p, n);
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t t = first; t < first + count; ++t) {
        const int64_t q_row = (b * p.heads + h) * p.tokens + t;
        const int64_t kv = b * p.kv_heads + h / p.group();
        double q_sum = 0;
        for (int64_t l = 0; l < p.latents; ++l)
          q_sum += std::exp(p.scale * p.q[q_row * p.latents + l]);
        const int64_t last = p.causal ? t : first + count - 1;
        for (int64_t l = 0; l < p.latents; ++l) {
          const double p_l = std::exp(p.scale * p.q[q_row * p.latents + l]) / q_sum;
          const auto weight = [&](int64_t s) {
            if (!p.key_mask.empty() && !p.key_mask[b * p.tokens + s]) return 0.0;
            return std::exp(p.scale * p.k[(kv * p.tokens + s) * p.latents + l]);
          };
          double k_sum = 0;
          for (int64_t s = first; s <= last; ++s) k_sum += weight(s);
          if (k_sum == 0) continue;
          for (int64_t s = first; s <= last; ++s)
            for (int64_t d = 0; d < p.dim && weight(s) != 0; ++d)
              y[q_row * p.dim + d] +=
                  p_l * weight(s) / k_sum * p.v[(kv * p.tokens + s) * p.dim + d];
        }
      }
    }
  }
  return y;
}

// The scalar whose gradient the backward pass computes, with the state's max held at `fixed_max`.
double loss(const Problem& p, const Doubles& fixed_max) {
  const Solution s = solve(p);
  double sum = 0;
  for (size_t i = 0; i < s.y.size(); ++i) sum += s.y[i].value * p.dy[i];
  if (!p.d_final) return sum;
  for (size_t i = 0; i < s.final_norm.size(); ++i)
    if (s.final_norm[i].value != 0)
      sum += s.final_norm[i].value * std::exp(s.final_max[i] - fixed_max[i]) * p.d_final->norm[i];
  for (size_t i = 0; i < s.final_mean.size(); ++i)
    sum += s.final_mean[i].value * p.d_final->mean[i];
  return sum;
}

// Case by case: bidirectional, packed, masked, grouped, continued.
const Case kCases[] = {
    {.tokens = 7,
     .latents = 3,
     .dim = 2,
     .scale = 0.7,
     .q = DType::float64,
     .k = DType::float64,
     .v = DType::float64},
    {.batch = 2,
     .tokens = 5,
     .latents = 2,
     .dim = 3,
     .causal = false,
     .q = DType::float64,
     .k = DType::float64,
     .v = DType::float64},
    {.heads = 4,
     .kv_heads = 2,
     .tokens = 6,
     .latents = 7,
     .dim = 2,
     .with_initial = true,
     .q = DType::float64,
     .k = DType::float64,
     .v = DType::float64},
    {.heads = 3,
     .kv_heads = 1,
     .tokens = 6,
     .latents = 2,
     .dim = 2,
     .causal = false,
     .masked = true,
     .q = DType::float64,
     .k = DType::float64,
     .v = DType::float64},
    {.heads = 2,
     .kv_heads = 1,
     .tokens = 6,
     .latents = 3,
     .dim = 2,
     .cu_seqlens = {0, 0, 4, 4, 6},
     .with_initial = true,
     .q = DType::float64,
     .k = DType::float64,
     .v = DType::float64},
    {.tokens = 6,
     .latents = 5,
     .dim = 2,
     .masked = true,
     .with_initial = true,
     .q = DType::float64,
     .k = DType::float64,
     .v = DType::float64},
};

}  // namespace

TEST_SUITE_BEGIN("reference");

TEST_CASE("the scan equals the definition") {
  for (const Case& c : kCases) {
    Problem p = make_problem(c);
    p.initial.reset();
    const Solution s = solve(p);
    const Doubles y = definition(p);
    for (size_t i = 0; i < y.size(); ++i)
      CHECK_MESSAGE(std::fabs(s.y[i].value - y[i]) < 1e-14 * s.y[i].magnitude + 1e-15, c.text());
  }
}

TEST_CASE("the gradients equal finite differences") {
  for (const Case& c : kCases) {
    Problem p = make_problem(c);
    const Solution s = solve(p);
    const auto check_gradient = [&](const char* what, Doubles& x,
                                    const reference::Reals& gradient) {
      for (size_t i = 0; i < x.size(); ++i) {
        if (!std::isfinite(x[i])) continue;  // masked
        const double at = x[i], h = 1e-5;
        x[i] = at + h;
        const double above = loss(p, s.final_max);
        x[i] = at - h;
        const double below = loss(p, s.final_max);
        x[i] = at;
        const double numeric = (above - below) / (2 * h);
        CHECK_MESSAGE(std::fabs(numeric - gradient[i].value) < 1e-8, what << "[" << i << "] ",
                      c.text());
      }
    };
    check_gradient("q", p.q, s.dq);
    check_gradient("k", p.k, s.dk);
    check_gradient("v", p.v, s.dv);
    if (!p.initial) continue;
    // Only seen latents have a gradient; the others stay empty.
    for (size_t i = 0; i < p.initial->norm.size(); ++i) {
      if (p.initial->norm[i] != 0) continue;
      CHECK(s.d_initial_norm[i].value == 0);
    }
    Doubles* const norms = &p.initial->norm;
    for (size_t i = 0; i < norms->size(); ++i) {
      if ((*norms)[i] == 0) continue;
      Doubles& x = *norms;
      const double at = x[i], h = 1e-4;
      x[i] = at + h;
      const double above = loss(p, s.final_max);
      x[i] = at - h;
      const double below = loss(p, s.final_max);
      x[i] = at;
      CHECK_MESSAGE(std::fabs((above - below) / (2 * h) - s.d_initial_norm[i].value) < 1e-7,
                    c.text());
    }
    for (size_t i = 0; i < p.initial->mean.size(); ++i) {
      if ((*norms)[i / p.dim] == 0) continue;
      double& x = p.initial->mean[i];
      const double at = x, h = 1e-4;
      x = at + h;
      const double above = loss(p, s.final_max);
      x = at - h;
      const double below = loss(p, s.final_max);
      x = at;
      CHECK_MESSAGE(std::fabs((above - below) / (2 * h) - s.d_initial_mean[i].value) < 1e-8,
                    c.text());
    }
  }
}

TEST_CASE("the merge of states equals the scan of the union") {
  const Case c{.tokens = 11, .latents = 5, .dim = 3, .keys = Keys::holes};
  const Problem whole = make_problem(c);
  const auto part = [&](int64_t first, int64_t count) {
    Problem p = whole;
    p.key_mask.assign(p.tokens, 0);
    for (int64_t t = first; t < first + count; ++t) p.key_mask[t] = 1;
    const Solution s = solve(p);
    reference::State state{s.final_max, {}, {}};
    for (const auto& x : s.final_norm) state.norm.push_back(x.value);
    for (const auto& x : s.final_mean) state.mean.push_back(x.value);
    return state;
  };
  const reference::State all = part(0, 11);
  for (int64_t cut = 0; cut <= 11; ++cut) {
    const reference::State merged = reference::merge(part(0, cut), part(cut, 11 - cut));
    CHECK(merged.max == all.max);
    for (size_t i = 0; i < all.norm.size(); ++i)
      CHECK(merged.norm[i] == doctest::Approx(all.norm[i]).epsilon(1e-14));
    for (size_t i = 0; i < all.mean.size(); ++i)
      CHECK(merged.mean[i] == doctest::Approx(all.mean[i]).epsilon(1e-13));
  }
}

TEST_SUITE_END();
