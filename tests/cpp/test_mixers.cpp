// SPDX-License-Identifier: Apache-2.0
// linear_recurrence, rg_lru and short_conv against plain double-precision loops over one channel.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "arrays.h"
#include "workspace.h"

namespace testing_latte {
namespace {

using Vector = std::vector<double>;
using latte::Error;

constexpr DType kTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};
constexpr Layout kLayouts[] = {Layout::contiguous, Layout::misaligned, Layout::transposed,
                               Layout::columns,    Layout::reversed,   Layout::gapped};

DType compute_type(DType dtype) {
  return dtype == DType::float64 ? DType::float64 : DType::float32;
}

struct Case {
  DType dtype = DType::float32;
  Layout layout = Layout::contiguous;
  int64_t batch = 2, tokens = 21, channels = 19, width = 4;
  bool flag = false;  // reverse, or centred
  bool state = true;
  int threads = 1;

  std::string text() const {
    return std::string(name_of(dtype)) + " layout " + std::to_string(static_cast<int>(layout)) +
           " T=" + std::to_string(tokens) + " C=" + std::to_string(channels) +
           " K=" + std::to_string(width) + (flag ? " flag" : "") + (state ? " state" : "") +
           " threads " + std::to_string(threads);
  }
};

// A call's tensors, filled with normal numbers.
class Call {
 public:
  explicit Call(const Case& c) : c(c) {}

  Array tokens() { return filled({c.batch, c.tokens, c.channels}, c.dtype); }
  Array state(int64_t rows = 0) {
    if (!c.state) return {};
    return rows ? filled({c.batch, rows, c.channels}, c.dtype)
                : filled({c.batch, c.channels}, compute_type(c.dtype));
  }
  Array filled(std::vector<int64_t> shape, DType dtype) {
    Array a(dtype, std::move(shape), c.layout);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < a.size(); ++i) a.set(i, normal(random_));
    return a;
  }

  // Of sequence n and channel d, in the order of the scan.
  Vector column(const Array& a, int64_t n, int64_t d) const {
    Vector v(c.tokens);
    for (int64_t t = 0; t < c.tokens; ++t)
      v[c.flag && turns ? c.tokens - 1 - t : t] = a.get((n * c.tokens + t) * c.channels + d);
    return v;
  }
  double at(const Array& a, int64_t n, int64_t d) const {
    return a.present() ? a.get(n * c.channels + d) : 0;
  }

  const Case c;
  bool turns = true;

 private:
  std::mt19937 random_{7};
};

// `scale`: the size of the terms before they cancel.
void expect_near(const char* name, const Vector& got, const Vector& want, DType stored,
                 double scale = 1) {
  double largest = scale;
  for (const double x : want) largest = std::max(largest, std::fabs(x));
  for (size_t i = 0; i < want.size(); ++i) {
    const double allowed = 100 * unit_roundoff(compute_type(stored)) * largest +
                           1.01 * unit_roundoff(stored) * std::fabs(want[i]) +
                           (stored == DType::float16 ? 0x1p-25 : 0);
    if (!(std::fabs(got[i] - want[i]) <= allowed)) {
      ADD_FAILURE() << name << "[" << i << "] is " << got[i] << ", expected " << want[i];
      return;
    }
  }
}

struct Scan {
  Vector h, da, db;
  double d_initial = 0;
};

// h[t] = a[t] h[t-1] + b[t] and its gradients.
Scan scan(const Vector& a, const Vector& b, double initial, const Vector& dh, double d_final) {
  const size_t n = a.size();
  Scan s{Vector(n), Vector(n), Vector(n)};
  double h = initial, carry = d_final;
  for (size_t t = 0; t < n; ++t) s.h[t] = h = a[t] * h + b[t];
  for (size_t t = n; t-- > 0;) {
    const double g = dh[t] + carry;
    s.db[t] = g;
    s.da[t] = g * (t ? s.h[t - 1] : initial);
    carry = a[t] * g;
  }
  s.d_initial = carry;
  return s;
}

double last(const Vector& h, double initial) { return h.empty() ? initial : h.back(); }

void check_linear(const Case& c) {
  SCOPED_TRACE(c.text());
  Call call(c);
  Array a = call.tokens(), b = call.tokens(), dh = call.tokens(), h = call.tokens();
  Array da = call.tokens(), db = call.tokens();
  Array initial = call.state(), final = call.state(), d_final = call.state();
  Array d_initial = call.state();
  for (int64_t i = 0; i < a.size(); ++i) a.set(i, 1 / (1 + std::exp(-a.get(i))));
  Array wide(compute_type(c.dtype), {c.batch, c.tokens, c.channels}, c.layout);
  for (Array* output : {&h, &da, &db, &wide}) output->poison();

  latte::LinearRecurrenceForward f;
  f.a = a.tensor(), f.b = b.tensor(), f.h = h.tensor();
  f.initial = initial.tensor(), f.final = final.tensor(), f.reverse = c.flag;
  run(backend::linear_recurrence_forward, f, c.threads);
  f.h = wide.tensor();
  run(backend::linear_recurrence_forward, f, c.threads);
  latte::LinearRecurrenceBackward g;
  g.a = a.tensor(), g.h = wide.tensor(), g.dh = dh.tensor(), g.da = da.tensor();
  g.db = db.tensor(), g.initial = initial.tensor(), g.d_final = d_final.tensor();
  g.d_initial = d_initial.tensor(), g.reverse = c.flag;
  run(backend::linear_recurrence_backward, g, c.threads);

  for (const Array* output : {&h, &final, &da, &db, &d_initial}) EXPECT_TRUE(output->intact());
  for (int64_t n = 0; n < c.batch; ++n)
    for (int64_t d = 0; d < c.channels; ++d) {
      const double h0 = call.at(initial, n, d);
      const Scan want = scan(call.column(a, n, d), call.column(b, n, d), h0, call.column(dh, n, d),
                             call.at(d_final, n, d));
      expect_near("h", call.column(h, n, d), want.h, c.dtype);
      expect_near("da", call.column(da, n, d), want.da, c.dtype);
      expect_near("db", call.column(db, n, d), want.db, c.dtype);
      if (!c.state) continue;
      const DType type = compute_type(c.dtype);
      expect_near("final", {call.at(final, n, d)}, {last(want.h, h0)}, type);
      expect_near("d_initial", {call.at(d_initial, n, d)}, {want.d_initial}, type);
    }
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void check_gated(const Case& c) {
  SCOPED_TRACE(c.text());
  Call call(c);
  Array x = call.tokens(), gate_a = call.tokens(), gate_x = call.tokens(), dy = call.tokens();
  Array y = call.tokens(), dx = call.tokens(), d_gate_a = call.tokens(), d_gate_x = call.tokens();
  Array lambda = call.filled({c.channels}, c.dtype), d_lambda = call.filled({c.channels}, c.dtype);
  Array initial = call.state(), final = call.state(), d_final = call.state();
  Array d_initial = call.state();
  Array wide(compute_type(c.dtype), {c.batch, c.tokens, c.channels}, c.layout);
  for (int64_t i = 0; i < lambda.size(); ++i) lambda.set(i, lambda.get(i) - 3);
  for (Array* output : {&y, &dx, &d_gate_a, &d_gate_x, &wide}) output->poison();

  latte::RgLruForward f;
  f.x = x.tensor(), f.gate_a = gate_a.tensor(), f.gate_x = gate_x.tensor();
  f.log_lambda = lambda.tensor(), f.initial = initial.tensor(), f.final = final.tensor();
  f.y = y.tensor(), f.reverse = c.flag;
  run(backend::rg_lru_forward, f, c.threads);
  f.y = wide.tensor();
  run(backend::rg_lru_forward, f, c.threads);
  latte::RgLruBackward g;
  g.x = f.x, g.gate_a = f.gate_a, g.gate_x = f.gate_x, g.log_lambda = f.log_lambda;
  g.initial = f.initial, g.reverse = f.reverse, g.y = wide.tensor(), g.dy = dy.tensor();
  g.d_final = d_final.tensor(), g.d_initial = d_initial.tensor(), g.dx = dx.tensor();
  g.d_gate_a = d_gate_a.tensor(), g.d_gate_x = d_gate_x.tensor();
  g.d_log_lambda = d_lambda.tensor();
  run(backend::rg_lru_backward, g, c.threads);

  for (const Array* output : {&y, &final, &dx, &d_gate_a, &d_gate_x, &d_lambda, &d_initial})
    EXPECT_TRUE(output->intact());
  for (int64_t d = 0; d < c.channels; ++d) {
    double sum = 0;
    const double softplus = std::log1p(std::exp(lambda.get(d)));
    for (int64_t n = 0; n < c.batch; ++n) {
      const Vector xs = call.column(x, n, d), as = call.column(gate_a, n, d);
      const Vector is = call.column(gate_x, n, d);
      const double h0 = call.at(initial, n, d);
      const size_t count = xs.size();
      Vector a(count), b(count), root(count);
      for (size_t t = 0; t < count; ++t) {
        a[t] = std::exp(-8 * sigmoid(as[t]) * softplus);
        root[t] = t == 0 && !c.state ? 1 : std::sqrt(1 - a[t] * a[t]);
        b[t] = root[t] * sigmoid(is[t]) * xs[t];
      }
      const Scan want = scan(a, b, h0, call.column(dy, n, d), call.at(d_final, n, d));
      Vector want_x(count), want_a(count), want_i(count);
      for (size_t t = 0; t < count; ++t) {
        const double r = sigmoid(as[t]), i = sigmoid(is[t]), g_b = want.db[t];
        want_x[t] = g_b * root[t] * i;
        want_i[t] = g_b * root[t] * xs[t] * i * (1 - i);
        double d_log_a = want.da[t] * a[t];
        if (t > 0 || c.state) d_log_a -= g_b * i * xs[t] * a[t] * a[t] / root[t];
        want_a[t] = d_log_a * -8 * softplus * r * (1 - r);
        sum += d_log_a * -8 * r * sigmoid(lambda.get(d));
      }
      expect_near("y", call.column(y, n, d), want.h, c.dtype);
      expect_near("dx", call.column(dx, n, d), want_x, c.dtype);
      expect_near("d_gate_a", call.column(d_gate_a, n, d), want_a, c.dtype);
      expect_near("d_gate_x", call.column(d_gate_x, n, d), want_i, c.dtype);
      if (!c.state) continue;
      const DType type = compute_type(c.dtype);
      expect_near("final", {call.at(final, n, d)}, {last(want.h, h0)}, type);
      expect_near("d_initial", {call.at(d_initial, n, d)}, {want.d_initial}, type);
    }
    expect_near("d_log_lambda", {d_lambda.get(d)}, {sum}, c.dtype,
                std::sqrt(c.batch * c.tokens + 1));
  }
}

void check_conv(Case c) {
  c.state &= !c.flag;
  SCOPED_TRACE(c.text());
  Call call(c);
  call.turns = false;
  const int64_t tail = c.width - 1, left = c.flag ? tail / 2 : tail;
  Array x = call.tokens(), dy = call.tokens(), y = call.tokens(), dx = call.tokens();
  Array weight = call.filled({c.channels, c.width}, c.dtype),
        bias = call.filled({c.channels}, c.dtype);
  Array d_weight = call.filled({c.channels, c.width}, c.dtype);
  Array d_bias = call.filled({c.channels}, c.dtype);
  const bool state = c.state && tail > 0;
  Array initial, final, d_final, d_initial;
  if (state)
    initial = call.state(tail), final = call.state(tail), d_final = call.state(tail),
    d_initial = call.state(tail);
  y.poison(), dx.poison();

  latte::ShortConvForward f;
  f.x = x.tensor(), f.weight = weight.tensor(), f.bias = bias.tensor(), f.y = y.tensor();
  f.initial = initial.tensor(), f.final = final.tensor(), f.causal = !c.flag;
  run(backend::short_conv_forward, f, c.threads);
  latte::ShortConvBackward g;
  g.x = f.x, g.weight = f.weight, g.initial = f.initial, g.causal = f.causal;
  g.dy = dy.tensor(), g.d_final = d_final.tensor(), g.dx = dx.tensor();
  g.d_weight = d_weight.tensor(), g.d_bias = d_bias.tensor(), g.d_initial = d_initial.tensor();
  run(backend::short_conv_backward, g, c.threads);

  for (const Array* output : {&y, &final, &dx, &d_weight, &d_bias, &d_initial})
    EXPECT_TRUE(output->intact());
  for (int64_t d = 0; d < c.channels; ++d) {
    Vector want_w(c.width), got_w(c.width);
    double want_b = 0;
    for (int64_t n = 0; n < c.batch; ++n) {
      const auto tail_at = [&](const Array& a, int64_t i) {
        return state ? a.get((n * tail + i) * c.channels + d) : 0;
      };
      // Input t at index t + tail.
      Vector all(c.tokens + 2 * tail), d_all(c.tokens + 2 * tail), want_y(c.tokens);
      const Vector xs = call.column(x, n, d), ds = call.column(dy, n, d);
      for (int64_t i = 0; i < tail; ++i) all[i] = tail_at(initial, i);
      std::copy(xs.begin(), xs.end(), all.begin() + tail);
      for (int64_t i = 0; i < tail; ++i) d_all[c.tokens + i] += tail_at(d_final, i);
      for (int64_t t = 0; t < c.tokens; ++t) {
        want_y[t] = bias.get(d);
        want_b += ds[t];
        for (int64_t j = 0; j < c.width; ++j) {
          const int64_t at = t - left + j + tail;
          want_y[t] += weight.get(d * c.width + j) * all[at];
          want_w[j] += ds[t] * all[at];
          d_all[at] += ds[t] * weight.get(d * c.width + j);
        }
      }
      expect_near("y", call.column(y, n, d), want_y, c.dtype);
      expect_near("dx", call.column(dx, n, d),
                  Vector(d_all.begin() + tail, d_all.begin() + tail + c.tokens), c.dtype);
      for (int64_t i = 0; state && i < tail; ++i) {
        EXPECT_EQ(tail_at(final, i), all[c.tokens + i]);
        expect_near("d_initial", {tail_at(d_initial, i)}, {d_all[i]}, c.dtype);
      }
    }
    for (int64_t j = 0; j < c.width; ++j) got_w[j] = d_weight.get(d * c.width + j);
    const double scale = std::sqrt(c.batch * c.tokens + 1);
    expect_near("d_weight", got_w, want_w, c.dtype, scale);
    expect_near("d_bias", {d_bias.get(d)}, {want_b}, c.dtype, scale);
  }
}

void check_all(const std::function<void(const Case&)>& check) {
  for (const DType dtype : kTypes)
    for (const Layout layout : kLayouts)
      for (const bool flag : {false, true}) {
        Case c;
        c.dtype = dtype, c.layout = layout, c.flag = flag, c.state = !flag;
        check(c);
      }
  for (const int64_t tokens : {0, 1, 2, 7, 8, 9, 64, 65})
    for (const int64_t channels : {1, 3, 16, 33, 530})
      for (const bool state : {false, true}) {
        Case c;
        c.tokens = tokens, c.channels = channels, c.state = state, c.threads = 2;
        check(c);
      }
}

TEST(LinearRecurrence, AgainstLoops) { check_all(check_linear); }
TEST(RgLru, AgainstLoops) { check_all(check_gated); }
TEST(ShortConv, AgainstLoops) { check_all(check_conv); }

TEST(ShortConv, Widths) {
  for (int64_t width = 1; width <= 8; ++width)
    for (const int64_t tokens : {1, 5, 20})
      for (const bool centred : {false, true}) {
        Case c;
        c.width = width, c.tokens = tokens, c.flag = centred;
        check_conv(c);
      }
}

TEST(LinearRecurrence, CutSequences) {
  Case c;
  c.batch = 1, c.tokens = 9000, c.channels = 5;
  for (const int threads : {2, 3, 7}) {
    c.threads = threads;
    check_linear(c);
    check_gated(c);
  }
}

template <class Params>
void expect_error(Error::Kind kind, const std::string& text, const Params& params) {
  try {
    workspace_size(params, 1);
    ADD_FAILURE() << "accepted, expected: " << text;
  } catch (const Error& error) {
    EXPECT_EQ(error.kind, kind) << error.what();
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

TEST(MixerErrors, Arguments) {
  const Case c;
  Call call(c);
  Array a = call.tokens(), other(DType::float32, {2, 21, 18}), wide(DType::float64, {2, 21, 19});
  Array weight = call.filled({19, 4}, DType::float32);
  latte::LinearRecurrenceForward f;
  f.a = f.b = f.h = a.tensor();
  EXPECT_GE(workspace_size(f, 1), 0);
  auto bad = f;
  bad.b = other.tensor();
  expect_error(Error::Kind::value,
               "[linear_recurrence] b has shape (2, 21, 18), expected (2, 21, 19)", bad);
  bad = f, bad.b = wide.tensor();
  expect_error(Error::Kind::type, "a, b have dtypes float32, float64", bad);
  bad = f, bad.h.stride[1] = 0;
  expect_error(Error::Kind::value, "h has stride 0 in dimension 1", bad);
  bad = f, bad.a.data = nullptr;
  expect_error(Error::Kind::value, "a has no data", bad);
  latte::ShortConvForward conv;
  conv.x = conv.y = a.tensor(), conv.weight = weight.tensor();
  EXPECT_GE(workspace_size(conv, 1), 0);
  conv.weight.shape[1] = 9;
  expect_error(Error::Kind::value, "[short_conv] weight has width 9, expected 1 to 8", conv);
  if (kTestsCuda) return;  // which has no threads, and needs no workspace here
  EXPECT_THROW(latte::linear_recurrence_forward(f, nullptr, 1), Error);
  EXPECT_THROW(latte::workspace_bytes(f, 0), Error);
}

}  // namespace
}  // namespace testing_latte
