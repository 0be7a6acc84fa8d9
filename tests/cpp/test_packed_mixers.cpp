// SPDX-License-Identifier: Apache-2.0
// Recurrences and convolutions: packed sequences equal each sequence alone, a masked token an
// absent one, and a fresh sequence one without a state.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "arrays.h"
#include "workspace.h"

namespace testing_latte {
namespace {

constexpr int64_t kChannels = 3;
// Short sequences, an empty one, and two that are long enough to be cut.
const std::vector<int64_t> kBorders = {0, 3, 3, 703, 704, 2604, 2610};
const int64_t kTokens = kBorders.back();
const int64_t kSequences = static_cast<int64_t>(kBorders.size()) - 1;

class Random {
 public:
  Array normal(std::vector<int64_t> shape) {
    Array a(DType::float32, std::move(shape));
    for (int64_t i = 0; i < a.size(); ++i) a.set(i, normal_(engine_));
    return a;
  }
  Array flags(int64_t count, double share) {
    Array a(DType::boolean, {count});
    for (int64_t i = 0; i < count; ++i) a.set(i, std::bernoulli_distribution(share)(engine_));
    return a;
  }

 private:
  std::mt19937 engine_{5};
  std::normal_distribution<double> normal_;
};

Array borders_of(DType dtype) {
  Array a(dtype, {kSequences + 1});
  for (int64_t i = 0; i <= kSequences; ++i) a.set(i, static_cast<double>(kBorders[i]));
  return a;
}
Array empty(std::vector<int64_t> shape) { return Array(DType::float32, std::move(shape)); }

// Rows `tokens` of a (1,T,C) array.
Array rows(const Array& a, const std::vector<int64_t>& tokens) {
  Array part = empty({1, static_cast<int64_t>(tokens.size()), kChannels});
  for (int64_t i = 0; i < part.size(); ++i)
    part.set(i, a.get(tokens[i / kChannels] * kChannels + i % kChannels));
  return part;
}
// Row n of an (N,...) array.
Array row(const Array& a, int64_t n, std::vector<int64_t> shape) {
  Array part = empty(std::move(shape));
  for (int64_t i = 0; i < part.size(); ++i) part.set(i, a.get(n * part.size() + i));
  return part;
}

void expect_near(const std::string& name, const Array& got, const std::vector<double>& want) {
  double largest = 1;
  for (const double x : want) largest = std::max(largest, std::fabs(x));
  ASSERT_EQ(static_cast<size_t>(got.size()), want.size()) << name;
  for (size_t i = 0; i < want.size(); ++i)
    ASSERT_NEAR(got.get(static_cast<int64_t>(i)), want[i], 200 * 0x1p-24 * largest)
        << name << "[" << i << "]";
}

// The tokens of a sequence that are there, in memory order.
std::vector<int64_t> tokens_of(int64_t n, const Array& mask = {}) {
  std::vector<int64_t> tokens;
  for (int64_t t = kBorders[n]; t < kBorders[n + 1]; ++t)
    if (!mask.present() || mask.get(t) != 0) tokens.push_back(t);
  return tokens;
}

// Results of the packed call, put together from those of calls on each sequence.
struct Whole {
  explicit Whole(int64_t rows) : values(rows * kChannels) {}
  void set(const std::vector<int64_t>& tokens, const Array& part) {
    for (int64_t i = 0; i < part.size(); ++i)
      values[tokens[i / kChannels] * kChannels + i % kChannels] = part.get(i);
  }
  void set(int64_t n, const Array& part) {
    for (int64_t i = 0; i < part.size(); ++i) values[n * part.size() + i] = part.get(i);
  }
  std::vector<double> values;
};

void check_linear(bool reverse, DType border_type) {
  Random random;
  const std::vector<int64_t> shape = {1, kTokens, kChannels}, states = {kSequences, kChannels};
  Array a = random.normal(shape), b = random.normal(shape), dh = random.normal(shape);
  for (int64_t i = 0; i < a.size(); ++i) a.set(i, 1 / (1 + std::exp(-a.get(i))));
  Array initial = random.normal(states), d_final = random.normal(states);
  Array h = empty(shape), da = empty(shape), db = empty(shape);
  Array final = empty(states), d_initial = empty(states), borders = borders_of(border_type);
  const auto calls = [&](const Array& a, const Array& b, const Array& initial, const Array& dh,
                         const Array& d_final, Array& h, Array& final, Array& da, Array& db,
                         Array& d_initial, const Array& borders) {
    latte::LinearRecurrenceForward f;
    f.a = a.tensor(), f.b = b.tensor(), f.initial = initial.tensor(), f.h = h.tensor();
    f.final = final.tensor(), f.cu_seqlens = borders.tensor(), f.reverse = reverse;
    run(backend::linear_recurrence_forward, f, 1);
    latte::LinearRecurrenceBackward g;
    g.a = f.a, g.cu_seqlens = f.cu_seqlens, g.initial = f.initial, g.h = f.h;
    g.dh = dh.tensor(), g.d_final = d_final.tensor(), g.da = da.tensor(), g.db = db.tensor();
    g.d_initial = d_initial.tensor(), g.reverse = reverse;
    run(backend::linear_recurrence_backward, g, 1);
  };
  calls(a, b, initial, dh, d_final, h, final, da, db, d_initial, borders);
  Whole want_h(kTokens), want_da(kTokens), want_db(kTokens), want_final(kSequences),
      want_d_initial(kSequences);
  for (int64_t n = 0; n < kSequences; ++n) {
    const std::vector<int64_t> tokens = tokens_of(n);
    const std::vector<int64_t> part = {1, static_cast<int64_t>(tokens.size()), kChannels};
    Array own_h = empty(part), own_da = empty(part), own_db = empty(part);
    Array own_final = empty({1, kChannels}), own_d_initial = empty({1, kChannels});
    calls(rows(a, tokens), rows(b, tokens), row(initial, n, {1, kChannels}), rows(dh, tokens),
          row(d_final, n, {1, kChannels}), own_h, own_final, own_da, own_db, own_d_initial, {});
    want_h.set(tokens, own_h), want_da.set(tokens, own_da), want_db.set(tokens, own_db);
    want_final.set(n, own_final), want_d_initial.set(n, own_d_initial);
  }
  expect_near("h", h, want_h.values);
  expect_near("final", final, want_final.values);
  expect_near("da", da, want_da.values);
  expect_near("db", db, want_db.values);
  expect_near("d_initial", d_initial, want_d_initial.values);
}

struct Gated {
  Array x, gate_a, gate_x, dy, initial, d_final;                // in
  Array y, final, dx, d_gate_a, d_gate_x, d_lambda, d_initial;  // out

  // With room for the outputs of as many tokens and sequences.
  void make_outputs(int64_t sequences) {
    const std::vector<int64_t> shape = {1, x.size() / kChannels, kChannels};
    y = empty(shape), dx = empty(shape), d_gate_a = empty(shape), d_gate_x = empty(shape);
    final = empty({sequences, kChannels}), d_initial = empty({sequences, kChannels});
    d_lambda = empty({kChannels});
  }
  void run_both(const Array& lambda, const Array& mask, const Array& borders, const Array& fresh,
                bool reverse) {
    latte::RgLruForward f;
    f.x = x.tensor(), f.gate_a = gate_a.tensor(), f.gate_x = gate_x.tensor();
    f.log_lambda = lambda.tensor(), f.initial = initial.tensor(), f.fresh = fresh.tensor();
    f.key_mask = mask.tensor(), f.cu_seqlens = borders.tensor(), f.y = y.tensor();
    if (f.key_mask.rank == 1) {  // of the only batch
      f.key_mask.rank = 2;
      f.key_mask.shape[1] = f.key_mask.shape[0], f.key_mask.shape[0] = 1;
      f.key_mask.stride[1] = 1;
    }
    f.final = final.tensor(), f.reverse = reverse;
    run(backend::rg_lru_forward, f, 1);
    latte::RgLruBackward g;
    g.x = f.x, g.gate_a = f.gate_a, g.gate_x = f.gate_x, g.log_lambda = f.log_lambda;
    g.key_mask = f.key_mask, g.cu_seqlens = f.cu_seqlens, g.initial = f.initial;
    g.fresh = f.fresh, g.y = f.y, g.dy = dy.tensor(), g.d_final = d_final.tensor();
    g.dx = dx.tensor(), g.d_gate_a = d_gate_a.tensor(), g.d_gate_x = d_gate_x.tensor();
    g.d_log_lambda = d_lambda.tensor(), g.d_initial = d_initial.tensor(), g.reverse = reverse;
    run(backend::rg_lru_backward, g, 1);
  }
};

// An absent token repeats y: its cotangent belongs to the token before it in the scan.
void check_gated(bool reverse, bool masked) {
  SCOPED_TRACE(std::string(reverse ? "reverse" : "") + (masked ? " masked" : ""));
  Random random;
  const std::vector<int64_t> shape = {1, kTokens, kChannels}, states = {kSequences, kChannels};
  Gated all;
  all.x = random.normal(shape), all.gate_a = random.normal(shape);
  all.gate_x = random.normal(shape), all.dy = random.normal(shape);
  all.initial = random.normal(states), all.d_final = random.normal(states);
  Array lambda = random.normal({kChannels});
  for (int64_t i = 0; i < kChannels; ++i) lambda.set(i, lambda.get(i) - 3);
  Array mask, fresh = random.flags(kSequences, 0.5), borders = borders_of(DType::int32);
  if (masked) {
    mask = random.flags(kTokens, 0.7);
    for (int64_t i = 0; i < 400; ++i)
      mask.set(kBorders[4] + i, 0), mask.set(kBorders[5] - 1 - i, 0);
  }
  for (int64_t i = 0; i < all.initial.size(); ++i)
    if (fresh.get(i / kChannels) != 0) all.initial.set(i, 0);
  all.make_outputs(kSequences);
  all.run_both(lambda, mask, borders, fresh, reverse);

  Whole y(kTokens), dx(kTokens), d_gate_a(kTokens), d_gate_x(kTokens), final(kSequences),
      d_initial(kSequences);
  std::vector<double> d_lambda(kChannels);
  for (int64_t n = 0; n < kSequences; ++n) {
    const std::vector<int64_t> tokens = tokens_of(n, mask), every = tokens_of(n);
    Gated own;
    own.x = rows(all.x, tokens), own.gate_a = rows(all.gate_a, tokens);
    own.gate_x = rows(all.gate_x, tokens), own.dy = rows(all.dy, tokens);
    if (fresh.get(n) == 0) own.initial = row(all.initial, n, {1, kChannels});
    own.d_final = row(all.d_final, n, {1, kChannels});
    own.make_outputs(1);
    // Cotangents of absent tokens, and what they repeat, in the order of the scan.
    const int64_t count = static_cast<int64_t>(every.size());
    std::vector<double> leading(kChannels);
    std::vector<int64_t> repeats(count, -1);
    int64_t seen = -1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = every[reverse ? count - 1 - i : i];
      if (!masked || mask.get(t) != 0) {
        ++seen;
      } else {
        const int64_t at = reverse ? static_cast<int64_t>(tokens.size()) - 1 - seen : seen;
        for (int64_t c = 0; c < kChannels; ++c) {
          const double d = all.dy.get(t * kChannels + c);
          if (seen < 0) {
            leading[c] += d;
          } else {
            own.dy.set(at * kChannels + c, own.dy.get(at * kChannels + c) + d);
          }
        }
        repeats[t - kBorders[n]] = seen < 0 ? -2 : at;
      }
    }
    own.run_both(lambda, {}, {}, {}, reverse);
    y.set(tokens, own.y), dx.set(tokens, own.dx), d_gate_a.set(tokens, own.d_gate_a);
    d_gate_x.set(tokens, own.d_gate_x), final.set(n, own.final), d_initial.set(n, own.d_initial);
    for (int64_t c = 0; c < kChannels; ++c) {
      d_lambda[c] += own.d_lambda.get(c);
      d_initial.values[n * kChannels + c] += leading[c];
      for (int64_t i = 0; i < count; ++i)
        if (repeats[i] != -1)
          y.values[(kBorders[n] + i) * kChannels + c] = repeats[i] == -2
                                                            ? all.initial.get(n * kChannels + c)
                                                            : own.y.get(repeats[i] * kChannels + c);
    }
  }
  expect_near("y", all.y, y.values);
  expect_near("final", all.final, final.values);
  expect_near("dx", all.dx, dx.values);
  expect_near("d_gate_a", all.d_gate_a, d_gate_a.values);
  expect_near("d_gate_x", all.d_gate_x, d_gate_x.values);
  expect_near("d_initial", all.d_initial, d_initial.values);
  expect_near("d_log_lambda", all.d_lambda, d_lambda);
}

void check_conv(int64_t width, bool causal) {
  SCOPED_TRACE("width " + std::to_string(width) + (causal ? " causal" : ""));
  Random random;
  const std::vector<int64_t> shape = {1, kTokens, kChannels};
  const bool state = causal && width > 1;
  Array x = random.normal(shape), dy = random.normal(shape);
  Array weight = random.normal({kChannels, width}), borders = borders_of(DType::int64);
  Array initial, d_final, final, d_initial;
  if (state) {
    const std::vector<int64_t> states = {kSequences, width - 1, kChannels};
    initial = random.normal(states), d_final = random.normal(states);
    final = empty(states), d_initial = empty(states);
  }
  const auto calls = [&](const Array& x, const Array& initial, const Array& dy,
                         const Array& d_final, Array& y, Array& final, Array& dx, Array& d_weight,
                         Array& d_initial, const Array& borders) {
    latte::ShortConvForward f;
    f.x = x.tensor(), f.weight = weight.tensor(), f.initial = initial.tensor();
    f.cu_seqlens = borders.tensor(), f.y = y.tensor(), f.final = final.tensor();
    f.causal = causal;
    run(backend::short_conv_forward, f, 1);
    latte::ShortConvBackward g;
    g.x = f.x, g.weight = f.weight, g.cu_seqlens = f.cu_seqlens, g.initial = f.initial;
    g.dy = dy.tensor(), g.d_final = d_final.tensor(), g.dx = dx.tensor();
    g.d_weight = d_weight.tensor(), g.d_initial = d_initial.tensor(), g.causal = causal;
    run(backend::short_conv_backward, g, 1);
  };
  Array y = empty(shape), dx = empty(shape), d_weight = empty({kChannels, width});
  calls(x, initial, dy, d_final, y, final, dx, d_weight, d_initial, borders);
  Whole want_y(kTokens), want_dx(kTokens), want_final(kSequences * (width - 1)),
      want_d_initial(kSequences * (width - 1));
  std::vector<double> want_weight(kChannels * width);
  for (int64_t n = 0; n < kSequences; ++n) {
    const std::vector<int64_t> tokens = tokens_of(n);
    const std::vector<int64_t> part = {1, static_cast<int64_t>(tokens.size()), kChannels};
    Array own_y = empty(part), own_dx = empty(part), own_weight = empty({kChannels, width});
    Array own_initial, own_d_final, own_final, own_d_initial;
    if (state) {
      const std::vector<int64_t> one = {1, width - 1, kChannels};
      own_initial = row(initial, n, one), own_d_final = row(d_final, n, one);
      own_final = empty(one), own_d_initial = empty(one);
    }
    calls(rows(x, tokens), own_initial, rows(dy, tokens), own_d_final, own_y, own_final, own_dx,
          own_weight, own_d_initial, {});
    want_y.set(tokens, own_y), want_dx.set(tokens, own_dx);
    for (int64_t i = 0; i < own_weight.size(); ++i) want_weight[i] += own_weight.get(i);
    if (state) want_final.set(n, own_final), want_d_initial.set(n, own_d_initial);
  }
  expect_near("y", y, want_y.values);
  expect_near("dx", dx, want_dx.values);
  expect_near("d_weight", d_weight, want_weight);
  if (!state) return;
  expect_near("final", final, want_final.values);
  expect_near("d_initial", d_initial, want_d_initial.values);
}

TEST(PackedLinearRecurrence, EqualsAlone) {
  for (const bool reverse : {false, true})
    for (const DType dtype : {DType::int32, DType::int64}) check_linear(reverse, dtype);
}

TEST(PackedRgLru, EqualsPresentTokensAlone) {
  for (const bool reverse : {false, true})
    for (const bool masked : {false, true}) check_gated(reverse, masked);
}

TEST(PackedShortConv, EqualsAlone) {
  for (const int64_t width : {1, 2, 4, 8})
    for (const bool causal : {true, false}) check_conv(width, causal);
}

}  // namespace
}  // namespace testing_latte
