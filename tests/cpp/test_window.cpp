// SPDX-License-Identifier: Apache-2.0
// Windows against the definition in double, and their steps.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "window_problem.h"

namespace testing_latte {
namespace {

TEST(Window, SizesAroundEveryBlock) {
  for (const DType type : window_types())
    for (const bool causal : {true, false})
      for (const int64_t tokens : {0, 1, 31, 64, 65, 140})
        for (const int64_t window : {1, 2, 8, 17, 64, 1000}) {
          WindowCase c;
          c.batch = 1, c.heads = 2, c.kv_heads = 1;
          c.tokens = tokens, c.window = window, c.causal = causal, c.type = type;
          c.key_dim = 1 + tokens % 17, c.dim = 1 + tokens % 33;
          SCOPED_TRACE(testing::Message() << name_of(type) << " T=" << tokens << " w=" << window
                                          << (causal ? " causal" : " symmetric"));
          WindowCall(c).check();
        }
}

TEST(Window, MasksPastsAndLayouts) {
  for (const bool causal : {true, false})
    for (const int64_t past : {0, 1, 9, 64, 100})
      for (const Layout layout : {Layout::contiguous, Layout::misaligned, Layout::transposed,
                                  Layout::columns, Layout::reversed, Layout::gapped}) {
        WindowCase c;
        c.past = past, c.causal = causal, c.masked = true, c.layout = layout, c.threads = 2;
        SCOPED_TRACE(testing::Message() << "past=" << past << " layout=" << int(layout));
        WindowCall(c).check();
      }
}

TEST(Window, Packed) {
  for (const DType type : window_types())
    for (const bool causal : {true, false})
      for (const int64_t past : {0, 70}) {
        WindowCase c;
        c.batch = 1, c.tokens = 150, c.borders = {0, 3, 3, 68, 149, 150};
        c.past = past, c.sinks = past > 0 ? 2 : 0, c.placed = past > 0, c.masked = !causal;
        c.causal = causal, c.type = type, c.threads = 2;
        SCOPED_TRACE(testing::Message()
                     << name_of(type) << " past=" << past << (causal ? " causal" : " symmetric"));
        WindowCall(c).check();
      }
}

TEST(Window, CapsLogits) {
  for (const DType type : window_types())
    for (const bool causal : {true, false})
      for (const double softcap : {1e-2, 0.5, 30.0}) {
        WindowCase c;
        c.softcap = softcap, c.causal = causal, c.masked = true, c.past = 9, c.type = type;
        SCOPED_TRACE(testing::Message() << name_of(type) << " softcap=" << softcap);
        WindowCall(c).check();
      }
}

TEST(Window, Sinks) {
  for (const DType type : window_types())
    for (const bool causal : {true, false})
      for (const int64_t sinks : {1, 4, 9, 64, 70})
        for (const bool placed : {false, true}) {
          WindowCase c;
          c.sinks = sinks, c.placed = placed, c.causal = causal, c.type = type;
          c.masked = sinks == 4, c.softcap = sinks == 9 ? 0.7 : 0, c.tokens = 60 + sinks;
          SCOPED_TRACE(testing::Message()
                       << name_of(type) << " n=" << sinks << (causal ? " causal" : " symmetric"));
          WindowCall(c).check();
        }
}

TEST(Window, SinksOfEveryLayout) {
  for (const Layout layout :
       {Layout::misaligned, Layout::transposed, Layout::columns, Layout::reversed, Layout::gapped})
    for (const int64_t past : {0, 9}) {
      WindowCase c;
      c.sinks = 3, c.placed = true, c.layout = layout, c.past = past, c.threads = 2;
      SCOPED_TRACE(testing::Message() << "layout=" << int(layout));
      WindowCall(c).check();
    }
}

// Window and positions at the ends of int64: what is nowhere in reach is seen or not, by its sign.
TEST(Window, SinksFarAway) {
  constexpr auto kEnd = std::numeric_limits<int64_t>::max();
  WindowCase c;
  c.sinks = 2, c.placed = true, c.batch = 1, c.type = kExactType;
  WindowCall near(c);
  near.set_positions({-1000, 1000});
  near.check();
  WindowCall far(c);
  far.set_positions({-kEnd - 1, kEnd});
  far.forward();
  far.backward();
  EXPECT_TRUE(far.y.bytes() == near.y.bytes());
  EXPECT_TRUE(far.dk_sink.bytes() == near.dk_sink.bytes());
  far.set_positions({-kEnd, kEnd});
  latte::SlidingWindowForward p = far.forward_params();
  p.window = kEnd;
  run(backend::sliding_window_forward, p, 1);
}

TEST(Window, CutsChangeNoBit) {
  for (const bool causal : {true, false}) {
    WindowCase c;
    c.sinks = 3;
    c.batch = c.heads = c.kv_heads = 1, c.tokens = 2500, c.window = 60, c.causal = causal;
    std::vector<unsigned char> first;
    for (const int threads : {1, 2, 7}) {
      c.threads = threads;
      WindowCall call(c);
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
  for (const DType type : window_types()) {
    WindowCase c;
    c.tokens = 40, c.window = 13, c.type = type;
    WindowCall call(c);
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
      p.scale = c.scale;
      run(backend::sliding_window_step, p, 2);
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
  WindowCall call(WindowCase{});
  latte::SlidingWindowForward p;
  p.q = call.q.tensor(), p.k = call.k.tensor(), p.v = call.v.tensor(), p.y = call.y.tensor();
  const auto message = [](const latte::SlidingWindowForward& params) -> std::string {
    try {
      workspace_size(params, 1);
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
  WindowCase with_sinks;
  with_sinks.sinks = 2;
  WindowCall sunk(with_sinks);
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
  bad = p;
  bad.past = 1;
  EXPECT_EQ(message(bad),
            "[sliding_window_attention] k has shape (2, 2, 70, 5), expected (2, 2, 71, 5) = "
            "(batch, key/value heads, keys, key channels) of q");
  if (kTestsCuda) return;  // values on the device are not read
  int64_t before[] = {0, -3};
  bad = sunk.forward_params();
  bad.start = {before, DType::int64, 1, {2}, {1}};
  EXPECT_EQ(message(bad), "[sliding_window_attention] start[1] is -3, expected at least 0");
}

}  // namespace
}  // namespace testing_latte
