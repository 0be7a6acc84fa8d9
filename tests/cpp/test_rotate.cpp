// SPDX-License-Identifier: Apache-2.0
// rotate against the formula in double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "arrays.h"
#include "workspace.h"

namespace testing_latte {
namespace {

using latte::Error;

struct Case {
  DType dtype = DType::float32;
  Layout layout = Layout::contiguous, y_layout = Layout::contiguous;
  int64_t batch = 2, heads = 3, tokens = 5, channels = 22, dim = 22;
  int64_t first = 0, step = 1;  // positions
  bool interleaved = false, inverse = false, rows_of_positions = false, in_place = false;
  DType rates = DType::boolean;  // none
  int threads = 1;

  std::string text() const {
    return std::string(name_of(dtype)) + " layouts " + std::to_string(static_cast<int>(layout)) +
           " " + std::to_string(static_cast<int>(y_layout)) + " T=" + std::to_string(tokens) +
           " D=" + std::to_string(channels) + " dim " + std::to_string(dim) + " first " +
           std::to_string(first) + (interleaved ? " interleaved" : "") +
           (inverse ? " inverse" : "") + (in_place ? " in place" : "");
  }
};

void check(const Case& c) {
  SCOPED_TRACE(c.text());
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  Array x(c.dtype, {c.batch, c.heads, c.tokens, c.channels}, c.layout);
  for (int64_t i = 0; i < x.size(); ++i) x.set(i, normal(random));
  const std::vector<double> was = x.values();
  Array y =
      c.in_place ? Array() : Array(c.dtype, {c.batch, c.heads, c.tokens, c.channels}, c.y_layout);
  const int64_t rows = c.rows_of_positions ? c.batch : 1;
  Array position = c.rows_of_positions ? Array(DType::int64, {c.batch, c.tokens}, c.layout)
                                       : Array(DType::int64, {c.tokens}, c.layout);
  for (int64_t i = 0; i < rows * c.tokens; ++i)
    position.set(i, static_cast<double>(c.first + c.step * i));
  Array rates;
  if (c.rates != DType::boolean) {
    rates = Array(c.rates, {c.dim / 2}, c.layout);
    for (int64_t i = 0; i < c.dim / 2; ++i) rates.set(i, normal(random));
  }

  latte::Rotate p;
  p.x = x.tensor(), p.position = position.tensor(), p.rates = rates.tensor();
  p.y = c.in_place ? x.tensor() : y.tensor();
  p.base = 500, p.dim = c.dim, p.interleaved = c.interleaved, p.inverse = c.inverse;
  run(backend::rotate, p, c.threads);

  const Array& out = c.in_place ? x : y;
  EXPECT_TRUE(x.intact() && y.intact() && position.intact() && rates.intact());
  const DType compute = c.dtype == DType::float64 ? DType::float64 : DType::float32;
  for (int64_t i = 0; i < out.size(); ++i) {
    const int64_t channel = i % c.channels, row = i - channel, t = i / c.channels % c.tokens;
    double want = was[i], size = 0;
    if (channel < c.dim) {
      const int64_t pair = c.interleaved ? channel / 2 : channel % (c.dim / 2);
      const bool second = c.interleaved ? channel % 2 : channel >= c.dim / 2;
      const int64_t other = c.interleaved ? channel ^ 1 : (channel + c.dim / 2) % c.dim;
      const int64_t b = i / c.channels / c.tokens / c.heads;
      const double rate =
          rates.present()
              ? rates.get(pair)
              : std::pow(500.0, -2.0 * static_cast<double>(pair) / static_cast<double>(c.dim));
      const double angle = position.get(c.rows_of_positions ? b * c.tokens + t : t) * rate;
      const double sine = std::sin(angle) * (second != c.inverse ? 1 : -1);
      want = was[i] * std::cos(angle) + was[row + other] * sine;
      size = std::fabs(was[i]) + std::fabs(was[row + other]);
    }
    const double allowed = 4 * unit_roundoff(compute) * size +
                           (channel < c.dim ? 1.01 * unit_roundoff(c.dtype) * std::fabs(want) : 0) +
                           (c.dtype == DType::float16 ? 0x1p-25 : 0);
    ASSERT_LE(std::fabs(out.get(i) - want), allowed) << "element " << i;
  }
}

TEST(Rotate, TypesAndLayouts) {
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16})
    for (const Layout layout :
         {Layout::contiguous, Layout::misaligned, Layout::transposed, Layout::columns,
          Layout::reversed, Layout::gapped, Layout::expanded_batch, Layout::expanded_tokens,
          Layout::expanded_channels})
      for (const bool interleaved : {false, true}) {
        Case c;
        c.dtype = dtype, c.layout = layout, c.interleaved = interleaved;
        c.inverse = !interleaved;
        check(c);
        if (is_expanded(layout)) continue;
        c.y_layout = layout, c.rows_of_positions = true, c.channels = 27;
        check(c);
        c.in_place = true;
        check(c);
      }
}

TEST(Rotate, Sizes) {
  for (const int64_t dim : {0, 2, 6, 16, 32, 34, 64, 66, 130})
    for (const int64_t rest : {0, 1, 5})
      for (const int64_t tokens : {0, 1, 3})
        for (const bool interleaved : {false, true}) {
          Case c;
          c.channels = dim + rest, c.dim = dim, c.tokens = tokens, c.interleaved = interleaved;
          check(c);
        }
  Case none;
  none.batch = 0;
  check(none);
}

// Blocks of tokens, in the order of either memory.
TEST(Rotate, ManyTokens) {
  for (const Layout layout : {Layout::contiguous, Layout::transposed})
    for (const int threads : {1, 2, 5}) {
      Case c;
      c.tokens = 1000, c.threads = threads, c.layout = c.y_layout = layout;
      check(c);
      c.rows_of_positions = true, c.batch = 3, c.step = -7;
      check(c);
    }
}

TEST(Rotate, Rates) {
  for (const DType dtype : {DType::float32, DType::float64})
    for (const DType rates : {DType::float32, DType::float64}) {
      Case c;
      c.dtype = dtype, c.rates = rates, c.layout = Layout::reversed;
      check(c);
    }
}

// On both sides of the largest angle that the kernel reduces itself.
TEST(Rotate, FarPositions) {
  for (const DType dtype : {DType::float32, DType::float64})
    for (const int64_t first : {-3, -1000000, 1000000, 1599998, -1600002, 1 << 30})
      for (const bool interleaved : {false, true}) {
        Case c;
        c.dtype = dtype, c.first = first, c.interleaved = interleaved, c.channels = c.dim = 64;
        check(c);
      }
}

TEST(Rotate, Errors) {
  Array x(DType::float32, {2, 3, 5, 8}), y(DType::float32, {2, 3, 5, 8});
  Array position(DType::int64, {5}), rates(DType::float64, {3});
  latte::Rotate good;
  good.x = x.tensor(), good.y = y.tensor(), good.position = position.tensor(), good.dim = 8;
  EXPECT_GE(workspace_size(good, 1), 0);
  const auto expect_error = [](Error::Kind kind, const char* text, const latte::Rotate& params) {
    try {
      workspace_size(params, 1);
      ADD_FAILURE() << "accepted, expected: " << text;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind, kind) << error.what();
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
  };
  auto bad = good;
  bad.dim = 7;
  expect_error(Error::Kind::value, "[rotate] dim is 7, expected an even number of at most 8", bad);
  bad.dim = 10;
  expect_error(Error::Kind::value, "[rotate] dim is 10, expected an even number", bad);
  bad.dim = -2;
  expect_error(Error::Kind::value, "[rotate] dim is -2, expected an even number", bad);
  bad = good, bad.base = 0;
  expect_error(Error::Kind::value, "[rotate] base is 0.000000, expected a positive number", bad);
  bad = good, bad.position.dtype = DType::int32;
  expect_error(Error::Kind::type, "[rotate] position has dtype int32, expected int64", bad);
  bad = good, bad.position.shape[0] = 4;
  expect_error(Error::Kind::value, "[rotate] position has shape (4,), expected (5,)", bad);
  bad = good, bad.rates = rates.tensor();
  expect_error(Error::Kind::value, "[rotate] rates has shape (3,), expected (4,)", bad);
  bad = good, bad.y.dtype = DType::bfloat16;
  expect_error(Error::Kind::type, "[rotate] y has dtype bfloat16, expected float32", bad);
  bad = good, bad.y.stride[1] = 0;
  expect_error(Error::Kind::value, "[rotate] y has stride 0 in dimension 1", bad);
  if (kTestsCuda) return;  // which has neither threads nor a workspace
  EXPECT_THROW(latte::rotate(good, nullptr, 1), Error);
  EXPECT_THROW(latte::workspace_bytes(good, 0), Error);
}

}  // namespace
}  // namespace testing_latte
