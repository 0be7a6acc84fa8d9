// SPDX-License-Identifier: Apache-2.0
// What only the CUDA forward pass has, beside the cases of tests/cpp/test_forward.cpp: tiles,
// segments, schedules, budgets; against the float64 oracle of tests/cpp.
#include <gtest/gtest.h>

#include "cuda/costs.h"
#include "cuda/emulation/cuda_emulation.h"
#include "edge_cases.h"
#include "problem.h"
#include "shared_limit.h"

namespace testing_latte {
namespace {

namespace emulation = latte::emulation;

constexpr DType kDeviceTypes[] = {DType::float32, DType::bfloat16, DType::float16};

// Every kernel, with whole tiles and vectors and without.
TEST(Attention, Tiles) {
  unsigned seed = 0;
  for (const DType dtype : kDeviceTypes)
    for (const int64_t latents : {16, 32, 64, 101, 128, 250, 256})
      for (const int64_t dim : {16, 90, 128})
        for (const bool causal : {true, false}) {
          Case c;
          c.tokens = 65, c.latents = latents, c.dim = dim;
          c.causal = causal, c.initial = causal && seed % 2, c.seed = ++seed;
          c.set_type(dtype);
          Call(c).check_forward();
        }
}

TEST(Attention, Edges) {
  for_each_edge([](Call& call) { call.check_forward(); });
}

// A latent's maximum jumps in the middle of a chunk: below and above the range of the products.
TEST(Attention, Jumps) {
  for (const DType dtype : kDeviceTypes)
    for (const double jump : {20.0, 58.0, 62.0, 150.0, 1e4})
      for (const bool causal : {true, false}) {
        Case c;
        c.tokens = 140, c.latents = 40, c.dim = 33, c.causal = causal, c.initial = causal;
        c.set_type(dtype);
        Call call(c);
        for (int64_t t = 90; t < c.tokens; ++t)
          for (int64_t l = 0; l < c.latents; l += 3) {
            const int64_t i = t * c.latents + l;
            call.k.set(i, call.k.get(i) + jump);
          }
        SCOPED_TRACE(jump);
        call.check_forward();
      }
}

TEST(Attention, JumpsBehindAnAbsentKey) {
  for_each_hidden_jump([](Call& call) { call.check_forward(); });
}

// Sequences long enough to be cut, alone and packed, with keys that leave segments empty.
TEST(Attention, Segments) {
  for (const DType dtype : kDeviceTypes)
    for (const Keys keys : {Keys::normal, Keys::jumps, Keys::infinite})
      for (const bool causal : {true, false})
        for (const bool packed : {true, false}) {
          Case c;
          c.tokens = 600, c.latents = 9, c.dim = 19, c.heads = 2;
          c.keys = keys, c.causal = causal, c.initial = causal && dtype != DType::float16;
          c.masked = packed;
          if (packed) c.borders = {0, 3, 3, 540, 600};
          c.set_type(dtype);
          Call call(c);
          EXPECT_GT(latte::cuda::workspace_bytes(call.forward_params()), 0);
          call.check_forward();
        }
}

// Segments, slices and heads that share keys, all at once.
TEST(Attention, SegmentsOfSlices) {
  for (const bool causal : {true, false}) {
    Case c;
    c.tokens = 513, c.latents = 130, c.dim = 33, c.heads = 2, c.kv_heads = 1;
    c.causal = causal, c.initial = causal, c.masked = true;
    if (causal) c.borders = {0, 0, 512, 513};
    c.set_type(DType::float16);
    Call(c).check_forward();
  }
}

// Whatever a measurement chooses, the values are the same.
TEST(Attention, AnyTuning) {
  const latte::cuda::Tuning before = latte::cuda::tuning();
  constexpr latte::cuda::Tuning kOthers[] = {{1, 1}, {6, 1}, {64, 100}};
  for (const latte::cuda::Tuning& tuning : kOthers) {
    latte::cuda::set_tuning(tuning);
    for (const bool causal : {true, false}) {
      Case c;
      c.tokens = 300, c.latents = 9, c.causal = causal, c.initial = causal;
      c.set_type(DType::bfloat16);
      Call(c).check_forward();
      Call(c).check_backward();
    }
  }
  latte::cuda::set_tuning(before);
  EXPECT_THROW(latte::cuda::set_tuning({0, 256}), latte::Error);
  EXPECT_THROW(latte::cuda::set_tuning({264, 0}), latte::Error);
}

// Devices with less shared memory cut L into more slices, and chunks that jump are walked as well.
TEST(Attention, LessSharedMemory) {
  for (const int64_t limit : {163, 99}) {
    const SharedLimit device(limit * 1024);
    for (const DType dtype : kDeviceTypes)
      for (const int64_t latents : {100, 256})
        for (const Keys keys : {Keys::normal, Keys::jumps})
          for (const bool causal : {true, false}) {
            Case c;
            c.tokens = 70, c.latents = latents, c.dim = 65, c.keys = keys;
            c.causal = causal, c.initial = causal;
            c.set_type(dtype);
            SCOPED_TRACE(limit);
            Call(c).check_forward();
          }
  }
}

// Tokens [from, to) of a tensor (B,H,T,C).
latte::Tensor tokens_of(latte::Tensor t, int64_t from, int64_t to) {
  t.data = static_cast<char*>(t.data) + from * t.stride[2] * element_size(t.dtype);
  t.shape[2] = to - from;
  return t;
}

// A call on all tokens equals two calls that hand on the state.
TEST(Attention, SplitAnywhere) {
  for (const DType dtype : kDeviceTypes)
    for (const Keys keys : {Keys::normal, Keys::jumps, Keys::infinite})
      for (const int64_t at : {0, 1, 64, 100}) {
        Case c;
        c.heads = 2, c.kv_heads = 1, c.tokens = 130, c.latents = 20, c.dim = 33;
        c.keys = keys, c.initial = true;
        c.set_type(dtype);
        SCOPED_TRACE(c.text() + " split at " + std::to_string(at));
        Call whole(c), halves(c);
        whole.forward();
        StateArrays middle(DType::float32, c.batch, c.kv_heads, c.latents, c.dim);
        for (const bool first : {true, false}) {
          latte::LatentAttentionForward p = halves.forward_params();
          const int64_t from = first ? 0 : at, to = first ? at : c.tokens;
          for (latte::Tensor* t : {&p.q, &p.k, &p.v, &p.y}) *t = tokens_of(*t, from, to);
          (first ? p.final : p.initial) = middle.state();
          run(p, 1);
        }
        const double factor = whole.forward_factor();
        const DType compute = DType::float32;
        expect_close("y", halves.y.values(), whole.y.values(), dtype, compute, factor);
        const StateArrays &a = halves.final, &b = whole.final;
        expect_close("max", a.max.values(), b.max.values(), compute, compute, 0);
        expect_close("norm", a.norm.values(), b.norm.values(), compute, compute, factor);
        expect_close("mean", a.mean.values(), b.mean.values(), compute, compute, factor);
      }
}

// Blocks and threads in other orders leave every bit as it is.
TEST(Attention, AnySchedule) {
  const emulation::Options before = emulation::options();
  for (const DType dtype : kDeviceTypes)
    for (const Keys keys : {Keys::normal, Keys::jumps})
      for (const bool causal : {true, false}) {
        Case c;
        c.tokens = 140, c.latents = 64, c.dim = 64, c.keys = keys, c.causal = causal;
        c.initial = causal;
        c.set_type(dtype);
        emulation::options().shuffle = false;
        Call in_order(c);
        in_order.check_forward();
        for (uint64_t seed = 1; seed <= 5; ++seed) {
          emulation::options() = {true, seed, 2, before.shared_bytes};
          Call shuffled(c);
          shuffled.forward();
          EXPECT_EQ(shuffled.output_bytes(), in_order.output_bytes()) << "seed " << seed;
        }
      }
  emulation::options() = before;
}

// Borders on the device are not checked: whatever they are, nothing outside is touched.
TEST(Attention, WrongBordersStayInside) {
  Case c;
  c.tokens = 70, c.borders = {0, 30, 70}, c.initial = true;
  Call call(c);
  call.borders.set(0, -5), call.borders.set(1, 900), call.borders.set(2, 40);
  call.forward();
  EXPECT_TRUE(call.y.intact() && call.final.intact());
}

// Every input is read once and y written once.
TEST(Attention, MovesTheLeastBytes) {
  for (const DType dtype : kDeviceTypes)
    for (const bool causal : {true, false}) {
      Case c;
      c.batch = 2, c.tokens = 200, c.latents = 64, c.dim = 64, c.states = false;
      c.causal = causal;
      c.set_type(dtype);
      Call call(c);
      emulation::reset_counters();
      call.forward();
      const emulation::Counters counters = emulation::counters();
      const uint64_t rows = 2 * 200, size = element_size(dtype);
      EXPECT_EQ(counters.async_bytes, rows * (64 + 64 + 64) * size);
      EXPECT_EQ(counters.load_bytes, 0u);
      EXPECT_EQ(counters.store_bytes, rows * 64 * size);
      EXPECT_EQ(counters.async_bytes + counters.store_bytes,
                rows * static_cast<uint64_t>(latte::cuda::forward_bytes(64, 64, dtype)));
      EXPECT_EQ(counters.ldmatrix_conflicts, 0u);
      if (!causal) continue;
      // Two sequences of four chunks.
      EXPECT_EQ(counters.mma, static_cast<uint64_t>(8 * latte::cuda::forward_products(4, 4) *
                                                    latte::cuda::product_instructions(dtype)));
    }
}

void expect_error(latte::Error::Kind kind, const std::string& text, const Case& c) {
  try {
    latte::cuda::workspace_bytes(Call(c).forward_params());
    ADD_FAILURE() << "accepted, expected: " << text;
  } catch (const latte::Error& error) {
    EXPECT_EQ(error.kind, kind);
    EXPECT_EQ(error.what(), text);
  }
}

TEST(Attention, Errors) {
  Case c;
  c.set_type(DType::float64);
  expect_error(latte::Error::Kind::type,
               "[latent_attention] q has dtype float64, expected float32, bfloat16 or float16 on "
               "CUDA",
               c);
  c = Case();
  c.latents = 257;
  expect_error(latte::Error::Kind::value,
               "[latent_attention] q, v have 257 latents and 6 channels, expected at most 256 of "
               "each on CUDA",
               c);
  c.latents = 5, c.tokens = 600;
  EXPECT_THROW(latte::cuda::latent_attention_forward(Call(c).forward_params(), nullptr, nullptr),
               latte::Error);
}

}  // namespace
}  // namespace testing_latte
