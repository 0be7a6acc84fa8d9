// SPDX-License-Identifier: Apache-2.0
// Windows against the definition in double: values, gradients and steps, in poisoned workspaces of
// the promised size, with nothing written outside of the outputs.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "arrays.h"

namespace testing_latte {
namespace {

using Vector = std::vector<double>;

template <class Params>
void run(void (*function)(const Params&, void*, int), const Params& params, int threads) {
  constexpr int64_t kGuard = 256;
  const int64_t bytes = latte::workspace_bytes(params, threads);
  std::vector<unsigned char> memory(bytes + 2 * kGuard, 0xFF);
  function(params, memory.data() + kGuard, threads);
  for (int64_t i = 0; i < kGuard; ++i) {
    ASSERT_EQ(memory[i], 0xFF) << "written before the workspace";
    ASSERT_EQ(memory[kGuard + bytes + i], 0xFF) << "written behind the workspace";
  }
}

struct Case {
  int64_t batch = 2, heads = 4, kv_heads = 2, tokens = 70, past = 0, key_dim = 5, dim = 6;
  int64_t window = 17;
  double softcap = 0;
  // With `placed` sinks have positions, and the sequences begin at positions of their own.
  int64_t sinks = 0;
  bool causal = true, masked = false, placed = false;
  DType type = DType::float32;
  Layout layout = Layout::contiguous;
  int threads = 1;
};

class Call {
 public:
  explicit Call(const Case& shape) : c(shape) {
    const int64_t keys = c.tokens + c.past;
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
    for (Array* a : {&q, &k, &v, &dy}) fill(*a);
    if (c.sinks > 0) {
      for (Array* a : {&q_sink, &dq_sink})
        *a = Array(c.type, {c.batch, c.heads, c.tokens, c.key_dim}, c.layout);
      for (Array* a : {&k_sink, &dk_sink})
        *a = Array(c.type, {c.batch, c.kv_heads, c.sinks, c.key_dim}, c.layout);
      for (Array* a : {&v_sink, &dv_sink})
        *a = Array(c.type, {c.batch, c.kv_heads, c.sinks, c.dim}, c.layout);
      for (Array* a : {&q_sink, &k_sink, &v_sink}) fill(*a);
    }
    if (c.placed) {
      position = Array(DType::int64, {c.batch, c.sinks});
      for (int64_t i = 0; i < position.size(); ++i)
        position.set(i, static_cast<double>(random_() % (c.tokens + 20)) - 10);
      start = Array(DType::int64, {c.batch});
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
    p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor(), p.key_mask = mask.tensor();
    p.y = y.tensor(), p.log_sum = log_sum.tensor(), p.wide = wide.tensor();
    set_sinks(p);
    p.window = c.window, p.past = c.past, p.causal = c.causal, p.scale = kScale,
    p.softcap = c.softcap;
    return p;
  }
  void forward() { run(latte::sliding_window_forward, forward_params(), c.threads); }
  void backward() {
    latte::SlidingWindowBackward p;
    p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor(), p.key_mask = mask.tensor();
    p.log_sum = log_sum.tensor(), p.wide = wide.tensor(), p.dy = dy.tensor();
    p.dq = dq.tensor(), p.dk = dk.tensor(), p.dv = dv.tensor();
    set_sinks(p);
    p.dq_sink = dq_sink.tensor(), p.dk_sink = dk_sink.tensor(), p.dv_sink = dv_sink.tensor();
    p.window = c.window, p.past = c.past, p.causal = c.causal, p.scale = kScale,
    p.softcap = c.softcap;
    run(latte::sliding_window_backward, p, c.threads);
  }

  template <class Params>
  void set_sinks(Params& p) {
    p.q_sink = q_sink.tensor(), p.k_sink = k_sink.tensor(), p.v_sink = v_sink.tensor();
    p.sink_position = position.tensor(), p.start = start.tensor();
  }

  void check() {
    forward();
    backward();
    for (const Array* a : {&y, &wide, &log_sum, &dq, &dk, &dv, &dq_sink, &dk_sink, &dv_sink})
      EXPECT_TRUE(a->intact());
    const int64_t keys = c.tokens + c.past, group = c.heads / c.kv_heads, all = keys + c.sinks;
    Vector ey(y.size()), edq(dq.size()), edk(dk.size()), edv(dv.size());
    Vector edq_sink(dq_sink.size()), edk_sink(dk_sink.size()), edv_sink(dv_sink.size());
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t t = 0; t < c.tokens; ++t) {
          const int64_t row = (b * c.heads + h) * c.tokens + t, kv = b * c.kv_heads + h / group;
          // What is attended to: the keys, then the sinks.
          const auto is_sink = [&](int64_t s) { return s >= keys; };
          const auto key_row = [&](int64_t s) {
            return is_sink(s) ? kv * c.sinks + s - keys : kv * keys + s;
          };
          const auto seen = [&](int64_t s) {
            if (is_sink(s)) {
              if (!c.placed) return true;
              const double away = start.get(b) + t - position.get(b * c.sinks + s - keys);
              return away >= c.window || (!c.causal && -away >= c.window);
            }
            const int64_t distance = c.past + t - s;
            return distance < c.window && (c.causal ? distance >= 0 : distance > -c.window) &&
                   (!c.masked || mask.get(b * keys + s) != 0);
          };
          Vector w(all), slope_of_cap(all), slope(all);
          double top = -INFINITY, sum = 0, along = 0;
          for (int64_t s = 0; s < all; ++s) {
            for (int64_t i = 0; i < c.key_dim; ++i)
              w[s] += kScale * (is_sink(s) ? q_sink : q).get(row * c.key_dim + i) *
                      (is_sink(s) ? k_sink : k).get(key_row(s) * c.key_dim + i);
            if (c.softcap > 0) w[s] = c.softcap * std::tanh(w[s] / c.softcap);
            slope_of_cap[s] = c.softcap > 0 ? 1 - w[s] * w[s] / (c.softcap * c.softcap) : 1;
            if (seen(s)) top = std::fmax(top, w[s]);
          }
          for (int64_t s = 0; s < all; ++s) sum += w[s] = seen(s) ? std::exp(w[s] - top) : 0;
          for (int64_t s = 0; s < all; ++s) {
            w[s] = sum == 0 ? 0 : w[s] / sum;
            for (int64_t d = 0; d < c.dim; ++d) {
              const int64_t at = key_row(s) * c.dim + d;
              const double value = (is_sink(s) ? v_sink : v).get(at);
              ey[row * c.dim + d] += w[s] * value;
              (is_sink(s) ? edv_sink : edv)[at] += w[s] * dy.get(row * c.dim + d);
              slope[s] += value * dy.get(row * c.dim + d);
            }
            along += w[s] * slope[s];
          }
          for (int64_t s = 0; s < all; ++s)
            for (int64_t i = 0; i < c.key_dim; ++i) {
              const double ds = kScale * w[s] * (slope[s] - along) * slope_of_cap[s];
              const int64_t of_query = row * c.key_dim + i, of_key = key_row(s) * c.key_dim + i;
              (is_sink(s) ? edq_sink : edq)[of_query] += ds * (is_sink(s) ? k_sink : k).get(of_key);
              (is_sink(s) ? edk_sink : edk)[of_key] += ds * (is_sink(s) ? q_sink : q).get(of_query);
            }
        }
    close("y", y, ey, 100);
    close("dq", dq, edq, 400);
    close("dk", dk, edk, 400);
    close("dv", dv, edv, 400);
    close("dq_sink", dq_sink, edq_sink, 400);
    close("dk_sink", dk_sink, edk_sink, 400);
    close("dv_sink", dv_sink, edv_sink, 400);
  }

  void close(const char* name, const Array& got, const Vector& expected, double factor) const {
    double largest = 1;
    for (const double x : expected) largest = std::fmax(largest, std::fabs(x));
    for (int64_t i = 0; i < got.size(); ++i) {
      const double allowed = factor * unit_roundoff(compute()) * largest +
                             1.01 * unit_roundoff(c.type) * std::fabs(expected[i]) +
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

  static constexpr double kScale = 0.4;
  const Case c;
  Array q, k, v, mask, y, wide, log_sum, dy, dq, dk, dv;
  Array q_sink, k_sink, v_sink, position, start, dq_sink, dk_sink, dv_sink;

 private:
  std::mt19937 random_{1};
};

constexpr DType kTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

TEST(Window, SizesAroundEveryBlock) {
  for (const DType type : kTypes)
    for (const bool causal : {true, false})
      for (const int64_t tokens : {0, 1, 31, 64, 65, 140})
        for (const int64_t window : {1, 2, 8, 17, 64, 1000}) {
          Case c;
          c.batch = 1, c.heads = 2, c.kv_heads = 1;
          c.tokens = tokens, c.window = window, c.causal = causal, c.type = type;
          c.key_dim = 1 + tokens % 17, c.dim = 1 + tokens % 33;
          SCOPED_TRACE(testing::Message() << name_of(type) << " T=" << tokens << " w=" << window
                                          << (causal ? " causal" : " symmetric"));
          Call(c).check();
        }
}

TEST(Window, MasksPastsAndLayouts) {
  for (const bool causal : {true, false})
    for (const int64_t past : {0, 1, 9, 64, 100})
      for (const Layout layout : {Layout::contiguous, Layout::misaligned, Layout::transposed,
                                  Layout::columns, Layout::reversed, Layout::gapped}) {
        Case c;
        c.past = past, c.causal = causal, c.masked = true, c.layout = layout, c.threads = 2;
        SCOPED_TRACE(testing::Message() << "past=" << past << " layout=" << int(layout));
        Call(c).check();
      }
}

TEST(Window, CapsLogits) {
  for (const DType type : kTypes)
    for (const bool causal : {true, false})
      for (const double softcap : {1e-2, 0.5, 30.0}) {
        Case c;
        c.softcap = softcap, c.causal = causal, c.masked = true, c.past = 9, c.type = type;
        SCOPED_TRACE(testing::Message() << name_of(type) << " softcap=" << softcap);
        Call(c).check();
      }
}

TEST(Window, Sinks) {
  for (const DType type : kTypes)
    for (const bool causal : {true, false})
      for (const int64_t sinks : {1, 4, 9, 64, 70})
        for (const bool placed : {false, true}) {
          Case c;
          c.sinks = sinks, c.placed = placed, c.causal = causal, c.type = type;
          c.masked = sinks == 4, c.softcap = sinks == 9 ? 0.7 : 0, c.tokens = 60 + sinks;
          SCOPED_TRACE(testing::Message()
                       << name_of(type) << " n=" << sinks << (causal ? " causal" : " symmetric"));
          Call(c).check();
        }
}

TEST(Window, SinksOfEveryLayout) {
  for (const Layout layout :
       {Layout::misaligned, Layout::transposed, Layout::columns, Layout::reversed, Layout::gapped})
    for (const int64_t past : {0, 9}) {
      Case c;
      c.sinks = 3, c.placed = true, c.layout = layout, c.past = past, c.threads = 2;
      SCOPED_TRACE(testing::Message() << "layout=" << int(layout));
      Call(c).check();
    }
}

// Window and positions at the ends of int64: what is nowhere in reach is seen or not, by its sign.
TEST(Window, SinksFarAway) {
  constexpr auto kEnd = std::numeric_limits<int64_t>::max();
  Case c;
  c.sinks = 2, c.placed = true, c.batch = 1, c.type = DType::float64;
  Call near(c);
  near.set_positions({-1000, 1000});
  near.check();
  Call far(c);
  far.set_positions({-kEnd - 1, kEnd});
  far.forward();
  far.backward();
  EXPECT_TRUE(far.y.bytes() == near.y.bytes());
  EXPECT_TRUE(far.dk_sink.bytes() == near.dk_sink.bytes());
  far.set_positions({-kEnd, kEnd});
  latte::SlidingWindowForward p = far.forward_params();
  p.window = kEnd;
  run(latte::sliding_window_forward, p, 1);
}

TEST(Window, CutsChangeNoBit) {
  for (const bool causal : {true, false}) {
    Case c;
    c.sinks = 3;
    c.batch = c.heads = c.kv_heads = 1, c.tokens = 2500, c.window = 60, c.causal = causal;
    std::vector<unsigned char> first;
    for (const int threads : {1, 2, 7}) {
      c.threads = threads;
      Call call(c);
      call.forward();
      call.backward();
      std::vector<unsigned char> all;
      for (const Array* a :
           {&call.y, &call.dq, &call.dk, &call.dv, &call.dq_sink, &call.dk_sink, &call.dv_sink}) {
        const auto bytes = a->bytes();
        all.insert(all.end(), bytes.begin(), bytes.end());
      }
      if (first.empty()) first = all;
      EXPECT_TRUE(all == first) << threads << " threads";
    }
  }
}

TEST(Window, StepsAreOneMoreToken) {
  for (const DType type : kTypes) {
    Case c;
    c.tokens = 40, c.window = 13, c.type = type;
    Call call(c);
    call.forward();
    Array key(type, {c.batch, c.kv_heads, c.window, c.key_dim});
    Array value(type, {c.batch, c.kv_heads, c.window, c.dim});
    Array valid(DType::boolean, {c.batch, c.window}), position(DType::int64, {c.batch});
    for (int64_t i = 0; i < valid.size(); ++i) valid.set(i, 0);
    for (int64_t i = 0; i < position.size(); ++i) position.set(i, 0);
    Array y(type, {c.batch, c.heads, c.dim});
    for (int64_t t = 0; t < c.tokens; ++t) {
      const auto row = [t](const Array& a) {
        latte::Tensor x = a.tensor();
        x.data = static_cast<char*>(x.data) + t * x.stride[2] * element_size(x.dtype);
        x.shape[2] = x.shape[3];
        x.stride[2] = x.stride[3];
        x.rank = 3;
        return x;
      };
      latte::SlidingWindowStep p;
      p.q = row(call.q), p.k = row(call.k), p.v = row(call.v), p.y = y.tensor();
      p.ring = {key.tensor(), value.tensor(), valid.tensor(), position.tensor()};
      p.scale = Call::kScale;
      run(latte::sliding_window_step, p, 2);
      Vector expected;
      for (int64_t h = 0; h < c.batch * c.heads; ++h)
        for (int64_t d = 0; d < c.dim; ++d)
          expected.push_back(call.wide.get((h * c.tokens + t) * c.dim + d));
      call.close("y", y, expected, 100);
    }
    EXPECT_EQ(position.get(1), c.tokens);
  }
}

TEST(Window, RejectsByName) {
  Call call(Case{});
  latte::SlidingWindowForward p;
  p.q = call.q.tensor(), p.k = call.k.tensor(), p.v = call.v.tensor(), p.y = call.y.tensor();
  const auto message = [](const latte::SlidingWindowForward& params) -> std::string {
    try {
      latte::workspace_bytes(params, 1);
    } catch (const latte::Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_EQ(message(p), "no error");
  auto bad = p;
  bad.window = 0;
  EXPECT_EQ(message(bad), "[sliding_window_attention] window is 0, expected at least 1");
  for (const double softcap : {-1.0, std::nan(""), HUGE_VAL}) {
    bad = p;
    bad.softcap = softcap;
    EXPECT_EQ(message(bad), "[sliding_window_attention] softcap is " + std::to_string(softcap) +
                                ", expected a positive finite number, or 0 for none");
  }
  Case with_sinks;
  with_sinks.sinks = 2;
  Call sunk(with_sinks);
  bad = sunk.forward_params();
  bad.v_sink.shape[2] = 3;
  EXPECT_EQ(message(bad),
            "[sliding_window_attention] sinks.v has shape (2, 2, 3, 6), expected (2, 2, 2, 6) = "
            "(sequences, key/value heads, sinks, channels)");
  bad = sunk.forward_params();
  bad.q_sink = {};
  EXPECT_EQ(message(bad),
            "[sliding_window_attention] sinks.q has shape (), expected (2, 4, 70, 5) = the shape "
            "of q");
  bad = sunk.forward_params();
  bad.k_sink.shape[2] = 0;
  EXPECT_EQ(message(bad), "[sliding_window_attention] sinks.k has 0 sinks, expected at least 1");
  int64_t before[] = {0, -3};
  bad = sunk.forward_params();
  bad.start = {before, DType::int64, 1, {2}, {1}};
  EXPECT_EQ(message(bad), "[sliding_window_attention] start[1] is -3, expected at least 0");
  bad = p;
  bad.past = 1;
  EXPECT_EQ(message(bad),
            "[sliding_window_attention] k has shape (2, 2, 70, 5), expected (2, 2, 71, 5) = "
            "(batch, key/value heads, keys, key channels) of q");
}

}  // namespace
}  // namespace testing_latte
