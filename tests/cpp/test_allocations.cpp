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
  EXPECT_GT(count([] { const std::vector<int> numbers(100); }), 0);
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

}  // namespace
}  // namespace testing_latte
