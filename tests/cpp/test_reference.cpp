// SPDX-License-Identifier: Apache-2.0
// The yardstick itself: hand-computed values, finite differences, 16-bit conversions.
#include <gtest/gtest.h>

#include <random>

#include "arrays.h"
#include "oracle.h"

namespace {

using namespace reference;
using testing_latte::kBfloat16;
using testing_latte::kFloat16;

Head random_head(bool causal, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  const auto draw = [&](size_t n) {
    Vector x(n);
    for (double& e : x) e = normal(random);
    return x;
  };
  Head h;
  h.tokens = 6, h.latents = 3, h.dim = 2, h.group = 2, h.causal = causal;
  h.q = draw(2 * 6 * 3), h.k = draw(6 * 3), h.v = draw(6 * 2);
  h.max = draw(3), h.norm = {1.5, 0, 2.5}, h.mean = draw(3 * 2);
  h.max[1] = -kInfinity, h.mean[2] = h.mean[3] = 0;
  h.k[4] = -kInfinity;
  return h;
}

TEST(Reference, HandComputedValues) {
  Head h;
  h.tokens = 2, h.latents = 2, h.dim = 1;
  h.q = {0, 0, 0, std::log(3.0)};
  h.k = {0, std::log(2.0), std::log(3.0), 0};
  h.v = {4, 8};
  h.max = {-kInfinity, -kInfinity}, h.norm = {0, 0}, h.mean = {0, 0};
  // Means after both tokens: (1*4 + 3*8)/4 = 7 and (2*4 + 1*8)/3 = 16/3.
  const Result causal = forward(h);
  EXPECT_NEAR(causal.y[0], 4, 1e-14);
  EXPECT_NEAR(causal.y[1], 0.25 * 7 + 0.75 * 16 / 3, 1e-14);
  EXPECT_NEAR(causal.max[0], std::log(3.0), 1e-14);
  EXPECT_NEAR(causal.norm[0], 4.0 / 3, 1e-14);
  EXPECT_NEAR(causal.mean[0], 7, 1e-14);
  h.causal = false;
  EXPECT_NEAR(forward(h).y[0], 0.5 * 7 + 0.5 * 16 / 3, 1e-14);
}

TEST(Reference, GradientsMatchFiniteDifferences) {
  for (const bool causal : {true, false}) {
    Head h = random_head(causal, 3);
    if (!causal) h.norm = {0, 0, 0};
    std::mt19937 random(5);
    std::normal_distribution<double> normal;
    Cotangents seeds{Vector(2 * 6 * 2), Vector(3), Vector(3 * 2)};
    for (Vector* s : {&seeds.y, &seeds.norm, &seeds.mean})
      for (double& x : *s) x = normal(random);
    const Vector max = forward(h).max;
    const auto objective = [&] {
      const Result r = forward(h);
      double sum = 0;
      for (size_t i = 0; i < r.y.size(); ++i) sum += r.y[i] * seeds.y[i];
      for (size_t i = 0; i < r.mean.size(); ++i) sum += r.mean[i] * seeds.mean[i];
      // norm relative to the maximum of the unperturbed call, which is a constant.
      for (size_t l = 0; l < max.size(); ++l)
        sum += r.norm[l] * mass(r.max[l], max[l]) * seeds.norm[l];
      return sum;
    };
    const Gradients g = backward(h, seeds);
    const auto slope = [&](double& x) {
      const double at = x, step = 1e-5;
      x = at + step;
      const double above = objective();
      x = at - step;
      const double below = objective();
      x = at;
      return (above - below) / (2 * step);
    };
    // A -inf key and an empty initial latent have no neighbourhood to differentiate in.
    const auto check = [&](const char* name, Vector& x, const Vector& gradient) {
      for (size_t i = 0; i < x.size(); ++i) {
        const bool isolated = std::isinf(x[i]) || (&x == &h.norm && x[i] == 0);
        EXPECT_NEAR(gradient[i], isolated ? 0 : slope(x[i]), 1e-8) << name << i;
      }
    };
    check("q", h.q, g.q);
    check("k", h.k, g.k);
    check("v", h.v, g.v);
    check("norm", h.norm, g.norm);
    check("mean", h.mean, g.mean);
  }
}

TEST(Half, EveryCodeSurvives) {
  for (const auto& format : {kBfloat16, kFloat16})
    for (int code = 0; code < 1 << 16; ++code) {
      const double x = format.decode(static_cast<uint16_t>(code));
      if (!std::isnan(x)) {
        ASSERT_EQ(format.encode(x), code);
      }
    }
}

TEST(Half, RoundsToNearestEven) {
  EXPECT_EQ(kFloat16.decode(kFloat16.encode(1 + 0x1p-11)), 1);
  EXPECT_EQ(kFloat16.decode(kFloat16.encode(1 + 3 * 0x1p-11)), 1 + 0x1p-9);
  EXPECT_EQ(kFloat16.decode(kFloat16.encode(65519)), 65504);
  EXPECT_TRUE(std::isinf(kFloat16.decode(kFloat16.encode(65520))));
  EXPECT_EQ(kFloat16.decode(kFloat16.encode(0x1p-25)), 0);
  EXPECT_EQ(kBfloat16.decode(kBfloat16.encode(1 + 0x1p-8)), 1);
}

}  // namespace
