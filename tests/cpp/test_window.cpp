// SPDX-License-Identifier: Apache-2.0
// Windows against the definition in double: values, gradients and steps, in poisoned workspaces of
// the promised size, with nothing written outside of the outputs.
#include <gtest/gtest.h>

#include <cmath>
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
  bool causal = true, masked = false;
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
    if (!c.masked) return;
    mask = Array(DType::boolean, {c.batch, keys});
    for (int64_t i = 0; i < mask.size(); ++i) mask.set(i, random_() % 4 != 0);
  }

  void forward() {
    latte::SlidingWindowForward p;
    p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor(), p.key_mask = mask.tensor();
    p.y = y.tensor(), p.log_sum = log_sum.tensor(), p.wide = wide.tensor();
    p.window = c.window, p.past = c.past, p.causal = c.causal, p.scale = kScale,
    p.softcap = c.softcap;
    run(latte::sliding_window_forward, p, c.threads);
  }
  void backward() {
    latte::SlidingWindowBackward p;
    p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor(), p.key_mask = mask.tensor();
    p.log_sum = log_sum.tensor(), p.wide = wide.tensor(), p.dy = dy.tensor();
    p.dq = dq.tensor(), p.dk = dk.tensor(), p.dv = dv.tensor();
    p.window = c.window, p.past = c.past, p.causal = c.causal, p.scale = kScale,
    p.softcap = c.softcap;
    run(latte::sliding_window_backward, p, c.threads);
  }

  void check() {
    forward();
    backward();
    for (const Array* a : {&y, &wide, &log_sum, &dq, &dk, &dv}) EXPECT_TRUE(a->intact());
    const int64_t keys = c.tokens + c.past, group = c.heads / c.kv_heads;
    Vector ey(y.size()), edq(dq.size()), edk(dk.size()), edv(dv.size());
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t t = 0; t < c.tokens; ++t) {
          const int64_t row = (b * c.heads + h) * c.tokens + t;
          const int64_t head = (b * c.kv_heads + h / group) * keys;
          Vector w(keys), slope_of_cap(keys);
          double top = -INFINITY, sum = 0;
          const auto seen = [&](int64_t s) {
            const int64_t distance = c.past + t - s;
            return distance < c.window && (c.causal ? distance >= 0 : distance > -c.window) &&
                   (!c.masked || mask.get(b * keys + s) != 0);
          };
          for (int64_t s = 0; s < keys; ++s) {
            for (int64_t i = 0; i < c.key_dim; ++i)
              w[s] += kScale * q.get(row * c.key_dim + i) * k.get((head + s) * c.key_dim + i);
            if (c.softcap > 0) w[s] = c.softcap * std::tanh(w[s] / c.softcap);
            slope_of_cap[s] = c.softcap > 0 ? 1 - w[s] * w[s] / (c.softcap * c.softcap) : 1;
            if (seen(s)) top = std::fmax(top, w[s]);
          }
          for (int64_t s = 0; s < keys; ++s) sum += w[s] = seen(s) ? std::exp(w[s] - top) : 0;
          Vector slope(keys);
          double along = 0;
          for (int64_t s = 0; s < keys; ++s) {
            w[s] = sum == 0 ? 0 : w[s] / sum;
            for (int64_t d = 0; d < c.dim; ++d) {
              ey[row * c.dim + d] += w[s] * v.get((head + s) * c.dim + d);
              edv[(head + s) * c.dim + d] += w[s] * dy.get(row * c.dim + d);
              slope[s] += v.get((head + s) * c.dim + d) * dy.get(row * c.dim + d);
            }
            along += w[s] * slope[s];
          }
          for (int64_t s = 0; s < keys; ++s)
            for (int64_t i = 0; i < c.key_dim; ++i) {
              const double ds = kScale * w[s] * (slope[s] - along) * slope_of_cap[s];
              edq[row * c.key_dim + i] += ds * k.get((head + s) * c.key_dim + i);
              edk[(head + s) * c.key_dim + i] += ds * q.get(row * c.key_dim + i);
            }
        }
    close("y", y, ey, 100);
    close("dq", dq, edq, 400);
    close("dk", dk, edk, 400);
    close("dv", dv, edv, 400);
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

TEST(Window, CutsChangeNoBit) {
  for (const bool causal : {true, false}) {
    Case c;
    c.batch = c.heads = c.kv_heads = 1, c.tokens = 2500, c.window = 60, c.causal = causal;
    std::vector<unsigned char> first;
    for (const int threads : {1, 2, 7}) {
      c.threads = threads;
      Call call(c);
      call.forward();
      call.backward();
      std::vector<unsigned char> all;
      for (const Array* a : {&call.y, &call.dq, &call.dk, &call.dv}) {
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
  bad = p;
  bad.past = 1;
  EXPECT_EQ(message(bad),
            "[sliding_window_attention] k has shape (2, 2, 70, 5), expected (2, 2, 71, 5) = "
            "(batch, key/value heads, keys, key channels) of q");
}

}  // namespace
}  // namespace testing_latte
