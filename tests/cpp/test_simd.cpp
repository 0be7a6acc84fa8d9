// SPDX-License-Identifier: Apache-2.0
// simd.h of LATTE_ISA against the C library.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "arrays.h"
#include "simd_probe.h"

namespace latte::LATTE_ISA {
const testing_latte::SimdProbe& probe();
}

namespace testing_latte {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

using latte::LATTE_ISA::probe;

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

using Floats = std::vector<float>;
using Halves = std::vector<uint16_t>;

// NaN of both signs, quiet and signalling, with the lowest and every payload bit set.
constexpr uint32_t kNaNs[] = {0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001,
                              0x7FC00001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FBFFFFF};

Floats exp_of(Floats x) {
  const size_t n = x.size();
  x.resize((n + 15) / 16 * 16);
  Floats y(x.size());
  probe().exp(x.data(), y.data(), static_cast<int64_t>(x.size()));
  y.resize(n);
  return y;
}

TEST(Simd, ExpIsWithinItsBound) {
  Floats x;
  for (int i = 0; i < 200000; ++i) x.push_back(-87.0f + 175.0f * static_cast<float>(i) / 200000.0f);
  for (int i = 0; i < 20000; ++i)
    x.push_back(std::ldexp(1.0f + static_cast<float>(i % 97) / 97.0f, -(i % 40)) *
                (i % 2 ? -1.0f : 1.0f));
  const Floats y = exp_of(x);
  for (size_t i = 0; i < x.size(); ++i) {
    const double expected = std::exp(static_cast<double>(x[i]));
    const double ulp = std::ldexp(1.0, std::ilogb(expected) - 23);
    ASSERT_LE(std::fabs(y[i] - expected), (2.5 + std::fabs(x[i]) / 20) * ulp) << x[i];
  }
}

TEST(Simd, ExpOfSpecialValues) {
  const Floats x = {0.0f, -0.0f, -kInf, -1e30f, -3.4e38f, -1000.0f, 0x1p-140f, -0x1p-140f};
  EXPECT_EQ(exp_of(x), (Floats{1, 1, 0, 0, 0, 0, 1, 1}));
}

TEST(Simd, ExpKeepsEveryNaN) {
  for (const uint32_t bits : kNaNs)
    EXPECT_TRUE(std::isnan(exp_of({float_of(bits)})[0])) << std::hex << bits;
}

TEST(Simd, TanhIsWithinItsBound) {
  Floats x;
  for (int i = 0; i < 400000; ++i) x.push_back(-20.0f + 1e-4f * static_cast<float>(i));
  for (int i = 0; i < 400000; ++i)
    x.push_back(std::ldexp(1.0f + static_cast<float>(i % 4001) / 4001.0f, -(i % 60)) *
                (i % 2 ? -1.0f : 1.0f));
  Floats y(x.size());
  const auto n = static_cast<int64_t>(x.size());
  probe().tanh(x.data(), y.data(), n);
  const std::vector<double> wide(x.begin(), x.end());
  std::vector<double> z(x.size());
  probe().tanh_double(wide.data(), z.data(), n);
  for (size_t i = 0; i < x.size(); ++i) {
    const double expected = std::tanh(wide[i]);
    ASSERT_LE(std::fabs(y[i] - expected), 4e-7 * std::fabs(expected)) << x[i];
    ASSERT_LE(std::fabs(z[i] - expected), 1e-14 * std::fabs(expected)) << x[i];
  }
}

TEST(Simd, TanhOfSpecialValues) {
  Floats x = {0.0f, -0.0f, kInf, -kInf, 3.4e38f, -3.4e38f, 88.0f, -1000.0f}, y(16);
  x.resize(16);
  probe().tanh(x.data(), y.data(), 16);
  y.resize(8);
  EXPECT_EQ(y, (Floats{0, 0, 1, -1, 1, -1, 1, -1}));
  EXPECT_FALSE(std::signbit(y[0]));
  EXPECT_TRUE(std::signbit(y[1]));
  for (const uint32_t bits : kNaNs) {
    Floats nan(16, float_of(bits));
    probe().tanh(nan.data(), nan.data(), 16);
    EXPECT_TRUE(std::isnan(nan[0])) << std::hex << bits;
  }
}

TEST(Simd, ReciprocalIsWithinTwoUlp) {
  Floats x, y(16000);
  for (int i = 0; i < 16000; ++i)
    x.push_back(std::ldexp(1.0f + static_cast<float>(i) / 16000.0f, i % 200 - 100));
  probe().reciprocal(x.data(), y.data(), 16000);
  for (size_t i = 0; i < x.size(); ++i)
    ASSERT_LE(std::fabs(static_cast<double>(y[i]) * x[i] - 1), 0x1p-22) << x[i];
}

TEST(Simd, SecondOperandOfMaxWinsWithNaN) {
  const float nan = float_of(kNaNs[0]);
  Floats a = {1, 2, nan, 3, nan, -kInf, kInf, -1}, b = {2, 1, 4, nan, nan, 5, nan, -kInf}, y(16);
  a.resize(16), b.resize(16);
  probe().max(a.data(), b.data(), y.data(), 16);
  const Floats expected = {2, 2, 4, nan, nan, 5, nan, -1};
  for (size_t i = 0; i < expected.size(); ++i)
    EXPECT_TRUE(std::isnan(expected[i]) ? std::isnan(y[i]) : y[i] == expected[i]) << i;
}

TEST(Simd, AnyGreaterLooksAtEveryLane) {
  Floats a(16, 1), b(16, 1);
  EXPECT_FALSE(probe().any_greater(a.data(), b.data()));
  for (int64_t i = 0; i < probe().lanes; ++i) {
    a[i] = 2;
    EXPECT_TRUE(probe().any_greater(a.data(), b.data())) << i;
    a[i] = float_of(kNaNs[0]);
    EXPECT_FALSE(probe().any_greater(a.data(), b.data())) << i;
    a[i] = 1;
  }
}

TEST(Simd, EveryHalfIsRead) {
  Halves x;
  for (uint32_t code = 0; code < 0x10000; ++code) x.push_back(static_cast<uint16_t>(code));
  Floats y(x.size());
  for (const bool vectors : {false, true}) {
    probe().load_float16(x.data(), y.data(), 0x10000, vectors);
    for (size_t i = 0; i < x.size(); ++i) {
      const auto expected = static_cast<float>(kFloat16.decode(x[i]));
      ASSERT_TRUE(std::isnan(expected) ? std::isnan(y[i]) : bits_of(y[i]) == bits_of(expected))
          << "float16 " << i << ", vectors " << vectors;
    }
    probe().load_bfloat16(x.data(), y.data(), 0x10000, vectors);
    for (size_t i = 0; i < x.size(); ++i) ASSERT_EQ(bits_of(y[i]), i << 16);
  }
}

// Every 16-bit number, its neighbours in float32 and the middle to the next one with its
// neighbours.
Floats rounding_cases(const HalfFormat& format) {
  Floats all;
  const uint32_t infinity = ((1u << format.exponent_bits) - 1) << format.mantissa_bits;
  for (uint32_t code = 0; code < infinity; ++code) {
    const double x = format.decode(static_cast<uint16_t>(code));
    const double above = code + 1 < infinity
                             ? format.decode(static_cast<uint16_t>(code + 1))
                             : 2 * x - format.decode(static_cast<uint16_t>(code - 1));
    for (const double y : {x, (x + above) / 2}) {
      const auto at = static_cast<float>(y);
      for (const float z : {std::nextafter(at, 0.0f), at, std::nextafter(at, kInf)})
        // A float32 subnormal counts as zero.
        if (z == 0 || z >= 0x1p-126f) all.push_back(z), all.push_back(-z);
    }
  }
  for (const float x : {kInf, -kInf}) all.push_back(x);
  all.resize((all.size() + 15) / 16 * 16);
  return all;
}

template <class Store>
void check_rounding(const HalfFormat& format, Store store_all) {
  const Floats x = rounding_cases(format);
  Halves y(x.size());
  for (const bool vectors : {false, true}) {
    store_all(x.data(), y.data(), static_cast<int64_t>(x.size()), vectors);
    for (size_t i = 0; i < x.size(); ++i)
      ASSERT_EQ(y[i], format.encode(x[i])) << x[i] << ", vectors " << vectors;
  }
  Floats nans(16, 1.0f);
  for (size_t i = 0; i < std::size(kNaNs); ++i) nans[i] = float_of(kNaNs[i]);
  for (const bool vectors : {false, true}) {
    store_all(nans.data(), y.data(), 16, vectors);
    for (size_t i = 0; i < std::size(kNaNs); ++i)
      EXPECT_TRUE(std::isnan(format.decode(y[i]))) << i << ", vectors " << vectors;
  }
}

TEST(Simd, Float16RoundsToNearestEven) { check_rounding(kFloat16, probe().store_float16); }
TEST(Simd, Bfloat16RoundsToNearestEven) { check_rounding(kBfloat16, probe().store_bfloat16); }

}  // namespace
}  // namespace testing_latte
