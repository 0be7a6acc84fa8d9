// SPDX-License-Identifier: Apache-2.0
// What only the CUDA backward pass has, beside the cases of tests/cpp/test_backward.cpp: slices,
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

// Every kernel, with one slice of L and D and several, whole vectors and not.
TEST(Gradient, Slices) {
  unsigned seed = 0;
  for (const DType dtype : kDeviceTypes)
    for (const int64_t latents : {16, 32, 64, 70, 250})
      for (const int64_t dim : {16, 64, 130})
        for (const bool causal : {true, false}) {
          Case c;
          c.tokens = 66, c.latents = latents, c.dim = dim;
          c.causal = causal, c.initial = causal && seed % 2, c.seed = ++seed;
          c.set_type(dtype);
          Call(c).check_backward();
        }
}

TEST(Gradient, Edges) {
  for_each_edge([](Call& call) { call.check_backward(); });
}

// A latent's maximum jumps in the middle of a chunk: below and above the range of the products.
TEST(Gradient, Jumps) {
  for (const DType dtype : kDeviceTypes)
    for (const double jump : {20.0, 58.0, 62.0, 150.0, 1e4})
      for (const int64_t latents : {40, 65}) {
        Case c;
        c.tokens = 110, c.latents = latents, c.dim = latents == 40 ? 33 : 65, c.initial = true;
        c.set_type(dtype);
        Call call(c);
        for (int64_t t = 80; t < c.tokens; ++t)
          for (int64_t l = 0; l < c.latents; l += 3) {
            const int64_t i = t * c.latents + l;
            call.k.set(i, call.k.get(i) + jump);
          }
        SCOPED_TRACE(jump);
        call.check_backward();
      }
}

TEST(Gradient, JumpsBehindAnAbsentKey) {
  for_each_hidden_jump([](Call& call) { call.check_backward(); });
}

// Sequences long enough to be cut, alone and packed, with keys that leave segments empty.
TEST(Gradient, Segments) {
  unsigned seed = 0;
  for (const DType dtype : kDeviceTypes)
    for (const Keys keys : {Keys::normal, Keys::jumps, Keys::infinite, Keys::falling})
      for (const bool causal : {true, false})
        for (const bool packed : {true, false}) {
          Case c;
          c.tokens = 600, c.latents = 9, c.dim = 19, c.heads = 2, c.kv_heads = packed ? 1 : 2;
          c.keys = keys, c.causal = causal, c.initial = causal && seed % 3 != 0;
          c.masked = packed, c.states = seed % 4 != 1, c.seed = ++seed;
          if (packed) c.borders = {0, 3, 3, 540, 600};
          c.set_type(dtype);
          Call(c).check_backward();
        }
}

// Segments, slices and heads that share keys, all at once.
TEST(Gradient, SegmentsOfSlices) {
  for (const DType dtype : kDeviceTypes)
    for (const bool causal : {true, false}) {
      Case c;
      c.tokens = 513, c.latents = 65, c.dim = 66, c.heads = 2, c.kv_heads = 1;
      c.causal = causal, c.initial = causal;
      c.set_type(dtype);
      Call(c).check_backward();
    }
}

// Devices with less shared memory cut L into more slices, and chunks that jump are walked as well.
TEST(Gradient, LessSharedMemory) {
  const SharedLimit device(99 * 1024);
  for (const DType dtype : kDeviceTypes)
    for (const Keys keys : {Keys::normal, Keys::jumps})
      for (const bool causal : {true, false}) {
        Case c;
        c.tokens = 70, c.latents = 64, c.dim = 65, c.keys = keys;
        c.causal = causal, c.initial = causal;
        c.set_type(dtype);
        Call(c).check_backward();
      }
}

// Factors that are found again in dq, which the scale multiplies: where it leaves nothing, the
// other kernel is taken.
TEST(Gradient, Scales) {
  for (const DType dtype : kDeviceTypes)
    for (const double scale : {0.5, -2.0, 1e-9, 1e-13, 0.0})
      for (const Keys keys : {Keys::normal, Keys::jumps}) {
        Case c;
        c.tokens = 100, c.latents = 20, c.dim = 21, c.initial = true, c.scale = scale;
        c.keys = keys;
        c.set_type(dtype);
        SCOPED_TRACE(scale);
        Call(c).check_backward();
      }
}

// Blocks and threads in other orders leave every bit as it is.
TEST(Gradient, AnySchedule) {
  const emulation::Options before = emulation::options();
  for (const DType dtype : kDeviceTypes)
    for (const Keys keys : {Keys::normal, Keys::jumps})
      for (const bool causal : {true, false}) {
        Case c;
        c.tokens = 70, c.latents = 65, c.dim = 65, c.keys = keys, c.causal = causal;
        c.initial = causal;
        c.set_type(dtype);
        emulation::options().shuffle = false;
        Call in_order(c);
        in_order.check_backward();
        for (uint64_t seed = 1; seed <= 5; ++seed) {
          emulation::options() = {true, seed, 2, before.shared_bytes};
          Call shuffled(c);
          shuffled.backward();
          EXPECT_EQ(shuffled.output_bytes(), in_order.output_bytes()) << "seed " << seed;
        }
      }
  emulation::options() = before;
}

// Borders on the device are not checked: whatever they are, nothing outside is touched.
TEST(Gradient, WrongBordersStayInside) {
  Case c;
  c.tokens = 70, c.borders = {0, 30, 70}, c.initial = true;
  Call call(c);
  call.borders.set(0, -5), call.borders.set(1, 900), call.borders.set(2, 40);
  call.backward();
  EXPECT_TRUE(call.dq.intact() && call.dk.intact() && call.dv.intact() && call.d_initial.intact());
}

// docs/gpu.md has the budget: q, k, v, dy once for dq, then again with dq, or with factors of
// float16, for dk and dv.
TEST(Gradient, MovesTheBytesOfItsBudget) {
  for (const DType dtype : kDeviceTypes) {
    Case c;
    c.batch = 2, c.tokens = 200, c.latents = 64, c.dim = 64, c.states = false;
    c.set_type(dtype);
    Call call(c);
    emulation::reset_counters();
    call.backward();
    const emulation::Counters counters = emulation::counters();
    const uint64_t tokens = 2 * 200, rows = tokens * 64, size = element_size(dtype);
    const bool recalls = latte::cuda::recalls_factors(dtype);
    const uint64_t factors = recalls ? 0 : 2 * rows * sizeof(float);
    const uint64_t along = recalls ? tokens * sizeof(float) : 0;
    const uint64_t borders = (recalls ? 2 : 1) * 2 * 4 * 64 * sizeof(float);
    EXPECT_EQ(counters.async_bytes, rows * (recalls ? 9 : 7) * size + factors);
    // The four lanes of a row read the same number.
    EXPECT_EQ(counters.load_bytes, borders + 4 * along);
    EXPECT_EQ(counters.store_bytes, rows * 3 * size + factors + borders + along);
    EXPECT_EQ(counters.ldmatrix_conflicts, 0u);
    EXPECT_EQ(counters.async_bytes + counters.store_bytes - borders + along,
              tokens * static_cast<uint64_t>(latte::cuda::backward_bytes(64, 64, dtype, recalls)));
    // Two sequences of four chunks.
    EXPECT_EQ(counters.mma,
              static_cast<uint64_t>(8 *
                                    (latte::cuda::query_gradient_products(4, 4) +
                                     latte::cuda::key_gradient_products(4, 4, recalls)) *
                                    latte::cuda::product_instructions(dtype)));
  }
}

// Without a causal order: q and dy for dq and the sum over queries, k and v for the state, then
// for dk and dv.
TEST(Gradient, MovesTheBytesOfItsBidirectionalBudget) {
  for (const DType dtype : kDeviceTypes) {
    Case c;
    c.batch = 2, c.tokens = 200, c.latents = 64, c.dim = 64, c.states = false, c.causal = false;
    c.set_type(dtype);
    Call call(c);
    emulation::reset_counters();
    call.backward();
    const emulation::Counters counters = emulation::counters();
    const uint64_t rows = 2 * 200 * 64, size = element_size(dtype);
    EXPECT_EQ(counters.async_bytes, rows * 6 * size);
    EXPECT_EQ(counters.load_bytes, 0u);
    EXPECT_EQ(counters.store_bytes, rows * 3 * size);
    EXPECT_EQ(counters.ldmatrix_conflicts, 0u);
  }
}

void expect_error(latte::Error::Kind kind, const std::string& text, const Case& c) {
  try {
    latte::cuda::workspace_bytes(Call(c).backward_params());
    ADD_FAILURE() << "accepted, expected: " << text;
  } catch (const latte::Error& error) {
    EXPECT_EQ(error.kind, kind);
    EXPECT_EQ(error.what(), text);
  }
}

TEST(Gradient, Errors) {
  Case c;
  c.set_type(DType::float64);
  expect_error(latte::Error::Kind::type,
               "[latent_attention_backward] q has dtype float64, expected float32, bfloat16 or "
               "float16 on CUDA",
               c);
  c = Case();
  c.dim = 257;
  expect_error(latte::Error::Kind::value,
               "[latent_attention_backward] q, v have 5 latents and 257 channels, expected at "
               "most 256 of each on CUDA",
               c);
  c = Case();
  EXPECT_THROW(latte::cuda::latent_attention_backward(Call(c).backward_params(), nullptr, nullptr),
               latte::Error);
}

}  // namespace
}  // namespace testing_latte
