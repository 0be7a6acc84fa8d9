// SPDX-License-Identifier: Apache-2.0
// The library allocates nothing: this executable counts every operator new, the library's included.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "problem.h"

namespace {
std::atomic<int64_t> allocations{0};
}

// Not inlined: GCC would warn that what malloc returned meets this delete.
__attribute__((noinline)) void* operator new(size_t size) {
  ++allocations;
  if (void* p = std::malloc(size ? size : 1)) return p;
  throw std::bad_alloc();
}
void* operator new[](size_t size) { return operator new(size); }
__attribute__((noinline)) void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { operator delete(p); }
void operator delete(void* p, size_t) noexcept { operator delete(p); }
void operator delete[](void* p, size_t) noexcept { operator delete(p); }

namespace testing_latte {
namespace {

template <class F>
int64_t count(F f) {
  const int64_t before = allocations;
  f();
  return allocations - before;
}

TEST(Allocations, AreCounted) {
  // Called as functions: a new expression may be optimised away.
  EXPECT_EQ(count([] { ::operator delete(::operator new(100)); }), 1);
}

TEST(Allocations, NoneInAnyCall) {
  for (const DType dtype : kTypes)
    for (const bool causal : {true, false})
      for (const int threads : {1, 2}) {
        Case c;
        c.batch = 2, c.heads = 4, c.kv_heads = 2, c.tokens = 130, c.latents = 33, c.dim = 43;
        c.causal = causal, c.initial = causal, c.masked = true;
        c.set_type(dtype);
        SCOPED_TRACE(c.text());
        const Call call(c);
        const auto forward = call.forward_params();
        const auto backward = call.backward_params();
        std::vector<unsigned char> memory(std::max(latte::workspace_bytes(forward, threads),
                                                   latte::workspace_bytes(backward, threads)));
        EXPECT_EQ(count([&] {
                    latte::workspace_bytes(forward, threads);
                    latte::latent_attention_forward(forward, memory.data(), threads);
                  }),
                  0);
        EXPECT_EQ(count([&] {
                    latte::workspace_bytes(backward, threads);
                    latte::latent_attention_backward(backward, memory.data(), threads);
                  }),
                  0);
      }
}

TEST(Allocations, NoneInStepAndMerge) {
  Case c;
  c.batch = 2, c.heads = 4, c.kv_heads = 2, c.tokens = 1, c.initial = true;
  const Call call(c);
  const latte::LatentAttentionStep step = call.step_params();
  std::vector<unsigned char> memory(latte::workspace_bytes(step, 1));
  EXPECT_EQ(count([&] { latte::latent_attention_step(step, memory.data(), 1); }), 0);
  EXPECT_EQ(count([&] { latte::state_merge({step.state, step.state, step.state}); }), 0);
}

// One token through a ring, a gate, a recurrence and a convolution.
TEST(Allocations, NoneInTheStepsOfOtherLayers) {
  constexpr int64_t n = 2, heads = 4, kv_heads = 2, window = 9, width = 8, latents = 5;
  const auto f32 = [](std::initializer_list<int64_t> shape) {
    Array a(DType::float32, shape);
    for (int64_t i = 0; i < a.size(); ++i) a.set(i, 0.25);
    return a;
  };
  const auto zeros = [](DType dtype, std::initializer_list<int64_t> shape) {
    Array a(dtype, shape);
    for (int64_t i = 0; i < a.size(); ++i) a.set(i, 0);
    return a;
  };
  const auto expect_none = [](const auto& params, auto run) {
    std::vector<unsigned char> memory(latte::workspace_bytes(params, 2));
    EXPECT_EQ(count([&] { run(params, memory.data(), 2); }), 0);
  };

  const Array q = f32({n, heads, width}), k = f32({n, kv_heads, width}), y = f32({n, heads, width});
  const Array key = f32({n, kv_heads, window, width}), value = f32({n, kv_heads, window, width});
  const Array valid = zeros(DType::boolean, {n, window}), position = zeros(DType::int64, {n});
  latte::SlidingWindowStep step;
  step.q = q.tensor(), step.k = k.tensor(), step.v = k.tensor(), step.y = y.tensor();
  step.ring = {key.tensor(), value.tensor(), valid.tensor(), position.tensor()};
  expect_none(step, latte::sliding_window_step);

  const Array q_latent = f32({n, heads, 1 + latents}), k_latent = f32({n, kv_heads, latents});
  const StateArrays state(DType::float32, n, kv_heads, latents, width);
  latte::MacchiatoStep gated;
  gated.q_latent = q_latent.tensor(), gated.window = step;
  gated.latent.k = k_latent.tensor(), gated.latent.v = k.tensor();
  gated.latent.state = state.state();
  expect_none(gated, latte::macchiato_step);

  const Array row = f32({n, 1, width}), out = f32({n, 1, width}), h = f32({n, width});
  const Array lambda = f32({width}), weight = f32({width, 4}), tail = f32({n, 3, width});
  latte::RgLruForward recurrence;
  recurrence.x = recurrence.gate_a = recurrence.gate_x = row.tensor();
  recurrence.log_lambda = lambda.tensor(), recurrence.y = out.tensor();
  recurrence.initial = recurrence.final = h.tensor();
  expect_none(recurrence, latte::rg_lru_forward);
  latte::ShortConvForward convolution;
  convolution.x = row.tensor(), convolution.weight = weight.tensor(), convolution.y = out.tensor();
  convolution.initial = convolution.final = tail.tensor();
  expect_none(convolution, latte::short_conv_forward);

  const Array token = f32({n, heads, 1, width}), at = zeros(DType::int64, {n, 1});
  latte::Rotate rotation;
  rotation.x = rotation.y = token.tensor(), rotation.position = at.tensor();
  rotation.dim = width / 2 * 2;
  expect_none(rotation, latte::rotate);
}

}  // namespace
}  // namespace testing_latte
