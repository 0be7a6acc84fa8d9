// SPDX-License-Identifier: Apache-2.0
// What only the CUDA kernels of windows have, beside the cases of tests/cpp/test_window.cpp: tiles,
// schedules, budgets, unchecked values.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cuda/emulation/cuda_emulation.h"
#include "shared_limit.h"
#include "window_problem.h"

namespace testing_latte {
namespace {

namespace emulation = latte::emulation;

std::string text(const WindowCase& c) {
  return std::string(name_of(c.type)) + " T=" + std::to_string(c.tokens) +
         " Dk=" + std::to_string(c.key_dim) + " D=" + std::to_string(c.dim) +
         (c.causal ? " causal" : " symmetric");
}

// Every kernel, with whole tiles and vectors and without.
TEST(Windows, Tiles) {
  struct Size {
    int64_t key_dim, dim;
  };
  for (const DType type : window_types())
    for (const Size& size : {Size{32, 16}, Size{64, 64}, Size{80, 96}, Size{128, 128}, Size{65, 31},
                             Size{256, 200}, Size{40, 256}, Size{256, 256}})
      for (const bool causal : {true, false}) {
        WindowCase c;
        c.batch = 1, c.heads = 2, c.kv_heads = 1, c.tokens = 130, c.window = 70, c.scale = 0.1;
        c.key_dim = size.key_dim, c.dim = size.dim, c.causal = causal, c.type = type;
        c.sinks = causal ? 3 : 0, c.masked = !causal;
        SCOPED_TRACE(text(c));
        WindowCall(c).check();
      }
}

// The smallest device holds every block but one, which raises before anything is written.
TEST(Windows, LessSharedMemory) {
  const SharedLimit device(99 * 1024);
  for (const DType type : window_types()) {
    WindowCase c;
    c.batch = 1, c.heads = 2, c.kv_heads = 1, c.tokens = 130, c.window = 70, c.scale = 0.1;
    c.key_dim = 256, c.dim = 200, c.type = type;
    WindowCall call(c);
    if (type != DType::float32) {
      call.check();
      continue;
    }
    call.forward();
    try {
      call.backward();
      ADD_FAILURE() << "a block of 256 channels of float32 was accepted";
    } catch (const latte::Error& error) {
      EXPECT_EQ(error.kind, latte::Error::Kind::runtime);
      EXPECT_STREQ(error.what(),
                   "[sliding_window_attention_backward] needs 166400 bytes of shared memory per "
                   "block, expected at most 101376 on this device");
    }
  }
}

std::vector<unsigned char> output_bytes(const WindowCall& call) {
  std::vector<unsigned char> all;
  for (const Array* a : {&call.y, &call.log_sum, &call.dq, &call.dk, &call.dv, &call.dq_sink,
                         &call.dk_sink, &call.dv_sink}) {
    const auto bytes = a->bytes();
    all.insert(all.end(), bytes.begin(), bytes.end());
  }
  return all;
}

// Blocks and threads in other orders leave every bit as it is.
TEST(Windows, AnySchedule) {
  const emulation::Options before = emulation::options();
  for (const DType type : window_types()) {
    WindowCase c;
    c.tokens = 100, c.window = 40, c.sinks = 5, c.placed = true, c.type = type;
    emulation::options().shuffle = false;
    WindowCall in_order(c);
    in_order.check();
    for (uint64_t seed = 1; seed <= 5; ++seed) {
      emulation::options() = {true, seed, 2, before.shared_bytes};
      WindowCall shuffled(c);
      shuffled.forward();
      shuffled.backward();
      EXPECT_EQ(output_bytes(shuffled), output_bytes(in_order)) << "seed " << seed;
    }
  }
  emulation::options() = before;
}

// Rows of the other side that the tiles of T = 200 tokens meet at window 70: a tile of queries
// [64 i, 64 i + 64) the keys from 64 i - 69 on, a tile of keys the queries up to 64 i + 63 + 69.
constexpr uint64_t kTokens = 200, kWindow = 70;
constexpr uint64_t kMet = 64 + 128 + (192 - 59) + (200 - 123);
constexpr uint64_t kMetByKeys = 133 + (197 - 64) + (200 - 128) + (200 - 192);

TEST(Windows, MovesTheLeastBytes) {
  for (const DType type : window_types()) {
    WindowCase c;
    c.batch = 1, c.heads = 4, c.kv_heads = 2, c.tokens = kTokens, c.window = kWindow;
    c.key_dim = 64, c.dim = 32, c.type = type;
    WindowCall call(c);
    const uint64_t size = element_size(type), row = (64 + 32) * size;
    latte::SlidingWindowForward forward = call.forward_params();
    forward.wide = {};
    emulation::reset_counters();
    run(backend::sliding_window_forward, forward, 1);
    emulation::Counters counters = emulation::counters();
    EXPECT_EQ(counters.async_bytes, 4 * (kTokens * 64 * size + kMet * row));
    EXPECT_EQ(counters.load_bytes, 0u);
    EXPECT_EQ(counters.store_bytes, 4 * kTokens * (32 * size + 4));
    EXPECT_EQ(counters.ldmatrix_conflicts, 0u);
    EXPECT_GT(counters.mma, 0u);

    call.forward();
    latte::SlidingWindowBackward backward = call.backward_params();
    backward.d_log_sum = {};
    emulation::reset_counters();
    run(backend::sliding_window_backward, backward, 1);
    counters = emulation::counters();
    EXPECT_EQ(counters.async_bytes,
              4 * (kTokens + kMet) * row + 2 * kTokens * row + 4 * kMetByKeys * row);
    // delta of every query; two numbers for a tile's own queries, which each of the four lanes of a
    // row asks for in one transaction, and for those that meet keys.
    EXPECT_EQ(counters.load_bytes,
              4 * (kTokens * 32 * (size + 4) + 4 * 2 * kTokens * 4 + 2 * kMetByKeys * 4));
    EXPECT_EQ(counters.store_bytes, 4 * kTokens * (4 + 64 * size) + 2 * kTokens * row);
    EXPECT_EQ(counters.ldmatrix_conflicts, 0u);
  }
}

// Borders on the device are not checked: whatever they are, nothing outside is touched.
TEST(Windows, WrongBordersStayInside) {
  WindowCase c;
  c.batch = 1, c.tokens = 70, c.borders = {0, 30, 70}, c.past = 9, c.sinks = 2;
  WindowCall call(c);
  call.borders.set(0, -5), call.borders.set(1, 900), call.borders.set(2, 40);
  call.forward();
  call.backward();
  for (const Array* a : {&call.y, &call.wide, &call.log_sum, &call.dq, &call.dk, &call.dv,
                         &call.dq_sink, &call.dk_sink, &call.dv_sink})
    EXPECT_TRUE(a->intact());
}

// Inputs of different types meet in float32.
TEST(Windows, MixedTypes) {
  WindowCase c;
  c.type = DType::bfloat16;
  WindowCall mixed(c), rounded(c);
  const auto widen = [](Array& a) {
    Array wide(DType::float32, {a.tensor().shape, a.tensor().shape + a.tensor().rank});
    wide.copy_from(a);
    a = std::move(wide);
  };
  widen(mixed.k), widen(mixed.dk);
  mixed.forward();
  mixed.backward();
  for (Array* a : {&rounded.q, &rounded.k, &rounded.v, &rounded.dy, &rounded.y, &rounded.dq,
                   &rounded.dk, &rounded.dv})
    widen(*a);
  rounded.forward();
  rounded.backward();
  EXPECT_EQ(mixed.wide.bytes(), rounded.wide.bytes());
  EXPECT_EQ(mixed.dk.bytes(), rounded.dk.bytes());
}

void expect_error(latte::Error::Kind kind, const std::string& message, const WindowCase& c) {
  try {
    latte::cuda::workspace_bytes(WindowCall(c).forward_params());
    ADD_FAILURE() << "accepted, expected: " << message;
  } catch (const latte::Error& error) {
    EXPECT_EQ(error.kind, kind);
    EXPECT_EQ(error.what(), message);
  }
}

TEST(Windows, Errors) {
  WindowCase c;
  c.type = DType::float64;
  expect_error(latte::Error::Kind::type,
               "[sliding_window_attention] q has dtype float64, expected float32, bfloat16 or "
               "float16 on CUDA",
               c);
  c = WindowCase();
  c.dim = 257;
  expect_error(latte::Error::Kind::value,
               "[sliding_window_attention] q, v have 5 and 257 channels, expected at most 256 of "
               "each on CUDA",
               c);
  WindowCall call{WindowCase()};
  EXPECT_THROW(latte::cuda::sliding_window_backward(call.backward_params(), nullptr, nullptr),
               latte::Error);
}

}  // namespace
}  // namespace testing_latte
