// SPDX-License-Identifier: Apache-2.0
// A random call over windows and its check against the definition in double: values and gradients,
// in poisoned workspaces of the promised size, with nothing written outside of the outputs.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "arrays.h"
#include "workspace.h"

namespace testing_latte {

using Vector = std::vector<double>;

// CUDA has no float64 here.
inline std::vector<DType> window_types() {
  std::vector<DType> types = {DType::float32, DType::bfloat16, DType::float16};
  if (!kTestsCuda) types.push_back(DType::float64);
  return types;
}
constexpr DType kExactType = kTestsCuda ? DType::float32 : DType::float64;

struct WindowCase {
  int64_t batch = 2, heads = 4, kv_heads = 2, tokens = 70, past = 0, key_dim = 5, dim = 6;
  int64_t window = 17;
  double scale = 0.4, softcap = 0;
  // With `placed` sinks have positions, and the sequences begin at positions of their own.
  int64_t sinks = 0;
  bool causal = true, masked = false, placed = false;
  DType type = DType::float32;
  Layout layout = Layout::contiguous;
  std::vector<int64_t> borders;  // of packed sequences, empty if not packed
  int threads = 1;

  int64_t sequences() const {
    return borders.empty() ? batch : static_cast<int64_t>(borders.size()) - 1;
  }
  int64_t keys() const { return tokens + past * (borders.empty() ? 1 : sequences()); }
};

class WindowCall {
 public:
  explicit WindowCall(const WindowCase& shape) : c(shape) {
    const int64_t keys = c.keys(), n = c.sequences();
    q = Array(c.type, {c.batch, c.heads, c.tokens, c.key_dim}, c.layout);
    k = Array(c.type, {c.batch, c.kv_heads, keys, c.key_dim}, c.layout);
    v = Array(c.type, {c.batch, c.kv_heads, keys, c.dim}, c.layout);
    y = Array(c.type, {c.batch, c.heads, c.tokens, c.dim}, c.layout);
    dy = Array(c.type, {c.batch, c.heads, c.tokens, c.dim}, c.layout);
    dq = Array(c.type, {c.batch, c.heads, c.tokens, c.key_dim}, c.layout);
    dk = Array(c.type, {c.batch, c.kv_heads, keys, c.key_dim}, c.layout);
    dv = Array(c.type, {c.batch, c.kv_heads, keys, c.dim}, c.layout);
    wide = Array(compute(), {c.batch, c.heads, c.tokens, c.dim});
    log_sum = Array(compute(), {c.batch, c.heads, c.tokens});
    d_log_sum = Array(compute(), {c.batch, c.heads, c.tokens});
    for (Array* a : {&q, &k, &v, &dy, &d_log_sum}) fill(*a);
    if (!c.borders.empty()) {
      borders = Array(DType::int32, {n + 1});
      for (int64_t i = 0; i <= n; ++i) borders.set(i, static_cast<double>(c.borders[i]));
    }
    if (c.sinks > 0) {
      for (Array* a : {&q_sink, &dq_sink})
        *a = Array(c.type, {c.batch, c.heads, c.tokens, c.key_dim}, c.layout);
      for (Array* a : {&k_sink, &dk_sink})
        *a = Array(c.type, {n, c.kv_heads, c.sinks, c.key_dim}, c.layout);
      for (Array* a : {&v_sink, &dv_sink})
        *a = Array(c.type, {n, c.kv_heads, c.sinks, c.dim}, c.layout);
      for (Array* a : {&q_sink, &k_sink, &v_sink}) fill(*a);
    }
    if (c.placed) {
      position = Array(DType::int64, {n, c.sinks});
      for (int64_t i = 0; i < position.size(); ++i)
        position.set(i, static_cast<double>(random_() % (c.tokens + 20)) - 10);
      start = Array(DType::int64, {n});
      for (int64_t i = 0; i < start.size(); ++i) start.set(i, static_cast<double>(5 * i));
    }
    if (!c.masked) return;
    mask = Array(DType::boolean, {c.batch, keys});
    for (int64_t i = 0; i < mask.size(); ++i) mask.set(i, random_() % 4 != 0);
  }

  void set_positions(std::initializer_list<int64_t> positions) {
    int64_t* p = static_cast<int64_t*>(position.tensor().data);
    for (const int64_t x : positions) *p++ = x;
  }

  latte::SlidingWindowForward forward_params() {
    latte::SlidingWindowForward p;
    set_inputs(p);
    p.y = y.tensor(), p.log_sum = log_sum.tensor(), p.wide = wide.tensor();
    return p;
  }
  latte::SlidingWindowBackward backward_params() {
    latte::SlidingWindowBackward p;
    set_inputs(p);
    p.log_sum = log_sum.tensor(), p.wide = wide.tensor();
    p.dy = dy.tensor(), p.d_log_sum = d_log_sum.tensor();
    p.dq = dq.tensor(), p.dk = dk.tensor(), p.dv = dv.tensor();
    p.dq_sink = dq_sink.tensor(), p.dk_sink = dk_sink.tensor(), p.dv_sink = dv_sink.tensor();
    return p;
  }
  void forward() { run(backend::sliding_window_forward, forward_params(), c.threads); }
  void backward() { run(backend::sliding_window_backward, backward_params(), c.threads); }

  void check() {
    forward();
    backward();
    for (const Array* a : {&y, &wide, &log_sum, &dq, &dk, &dv, &dq_sink, &dk_sink, &dv_sink})
      EXPECT_TRUE(a->intact());
    Expected e(*this);
    for (int64_t n = 0; n < c.sequences(); ++n)
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t t = 0; t < range(n).tokens; ++t) add_row(n, h, t, e);
    close("y", y, e.y, 100);
    close("wide", wide, e.y, 100);
    close("log_sum", log_sum, e.log_sum, 100);
    close("dq", dq, e.dq, 400);
    close("dk", dk, e.dk, 400);
    close("dv", dv, e.dv, 400);
    close("dq_sink", dq_sink, e.dq_sink, 400);
    close("dk_sink", dk_sink, e.dk_sink, 400);
    close("dv_sink", dv_sink, e.dv_sink, 400);
  }

  void close(const char* name, const Array& got, const Vector& expected, double factor) const {
    double largest = 1;
    for (const double x : expected)
      if (std::isfinite(x)) largest = std::fmax(largest, std::fabs(x));
    // CUDA rounds the factors of its products of half precision: weights, and slopes.
    const bool is_half = element_size(c.type) == 2;
    const double unit =
        kTestsCuda && is_half ? unit_roundoff(c.type) / 50 : unit_roundoff(compute());
    for (int64_t i = 0; i < got.size(); ++i) {
      if (got.get(i) == expected[i]) continue;  // -inf too
      const double allowed = factor * unit * largest +
                             1.01 * unit_roundoff(got.dtype()) * std::fabs(expected[i]) +
                             (c.type == DType::float16 ? 0x1p-25 : 0);
      ASSERT_LE(std::fabs(got.get(i) - expected[i]), allowed)
          << name << "[" << i << "] is " << got.get(i) << ", expected " << expected[i];
    }
  }

  DType compute() const { return c.type == DType::float64 ? DType::float64 : DType::float32; }
  void fill(Array& a) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < a.size(); ++i) a.set(i, normal(random_));
  }

  const WindowCase c;
  Array q, k, v, mask, borders, y, wide, log_sum, dy, d_log_sum, dq, dk, dv;
  Array q_sink, k_sink, v_sink, position, start, dq_sink, dk_sink, dv_sink;

 private:
  struct Range {
    int64_t batch, first, tokens, first_key;
  };
  Range range(int64_t n) const {
    if (c.borders.empty()) return {n, 0, c.tokens, 0};
    return {0, c.borders[n], c.borders[n + 1] - c.borders[n], c.borders[n] + n * c.past};
  }

  struct Expected {
    explicit Expected(const WindowCall& call)
        : y(call.y.size()),
          log_sum(call.log_sum.size()),
          dq(call.dq.size()),
          dk(call.dk.size()),
          dv(call.dv.size()),
          dq_sink(call.dq_sink.size()),
          dk_sink(call.dk_sink.size()),
          dv_sink(call.dv_sink.size()) {}
    Vector y, log_sum, dq, dk, dv, dq_sink, dk_sink, dv_sink;
  };

  // What a token may attend to: a key or a sink, its logit and the slope of its cap.
  struct Seen {
    bool is_sink;
    int64_t row;  // of k or of k_sink
    double logit, slope_of_cap;
  };
  std::vector<Seen> seen_by(int64_t n, int64_t h, int64_t t, int64_t row) const {
    const Range r = range(n);
    const int64_t kv = h / (c.heads / c.kv_heads);
    std::vector<Seen> all;
    const auto add = [&](bool is_sink, int64_t key_row) {
      double x = 0;
      for (int64_t i = 0; i < c.key_dim; ++i)
        x += c.scale * (is_sink ? q_sink : q).get(row * c.key_dim + i) *
             (is_sink ? k_sink : k).get(key_row * c.key_dim + i);
      if (c.softcap > 0) x = c.softcap * std::tanh(x / c.softcap);
      all.push_back({is_sink, key_row, x, c.softcap > 0 ? 1 - x * x / (c.softcap * c.softcap) : 1});
    };
    for (int64_t s = 0; s < r.tokens + c.past; ++s) {
      const int64_t distance = c.past + t - s, key = r.first_key + s;
      if (distance >= c.window || distance < (c.causal ? 0 : 1 - c.window)) continue;
      if (c.masked && mask.get(r.batch * c.keys() + key) == 0) continue;
      add(false, (r.batch * c.kv_heads + kv) * c.keys() + key);
    }
    for (int64_t i = 0; i < c.sinks; ++i) {
      const double away =
          c.placed ? start.get(n) + static_cast<double>(t) - position.get(n * c.sinks + i) : 0;
      const auto window = static_cast<double>(c.window);
      if (c.placed && away < window && (c.causal || -away < window)) continue;
      add(true, (n * c.kv_heads + kv) * c.sinks + i);
    }
    return all;
  }

  // The values of a token, and what it adds to the gradients.
  void add_row(int64_t n, int64_t h, int64_t t, Expected& e) const {
    const Range r = range(n);
    const int64_t row = (r.batch * c.heads + h) * c.tokens + r.first + t;
    const std::vector<Seen> all = seen_by(n, h, t, row);
    double top = -INFINITY, sum = 0, along = -d_log_sum.get(row);
    for (const Seen& s : all) top = std::fmax(top, s.logit);
    for (const Seen& s : all) sum += std::exp(s.logit - top);
    e.log_sum[row] = all.empty() ? -INFINITY : top + std::log(sum);
    Vector slope;
    for (const Seen& s : all) {
      const double w = std::exp(s.logit - e.log_sum[row]);
      slope.push_back(0);
      for (int64_t d = 0; d < c.dim; ++d) {
        const int64_t at = s.row * c.dim + d;
        const double value = (s.is_sink ? v_sink : v).get(at), gradient = dy.get(row * c.dim + d);
        e.y[row * c.dim + d] += w * value;
        (s.is_sink ? e.dv_sink : e.dv)[at] += w * gradient;
        slope.back() += value * gradient;
      }
      along += w * slope.back();
    }
    for (size_t j = 0; j < all.size(); ++j) {
      const Seen& s = all[j];
      const double ds =
          c.scale * std::exp(s.logit - e.log_sum[row]) * (slope[j] - along) * s.slope_of_cap;
      for (int64_t i = 0; i < c.key_dim; ++i) {
        const int64_t of_query = row * c.key_dim + i, of_key = s.row * c.key_dim + i;
        (s.is_sink ? e.dq_sink : e.dq)[of_query] += ds * (s.is_sink ? k_sink : k).get(of_key);
        (s.is_sink ? e.dk_sink : e.dk)[of_key] += ds * (s.is_sink ? q_sink : q).get(of_query);
      }
    }
  }

  template <class Params>
  void set_inputs(Params& p) const {
    p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor(), p.key_mask = mask.tensor();
    p.cu_seqlens = borders.tensor();
    p.q_sink = q_sink.tensor(), p.k_sink = k_sink.tensor(), p.v_sink = v_sink.tensor();
    p.sink_position = position.tensor(), p.start = start.tensor();
    p.window = c.window, p.past = c.past, p.causal = c.causal;
    p.scale = c.scale, p.softcap = c.softcap;
  }

  std::mt19937 random_{1};
};

}  // namespace testing_latte
