// SPDX-License-Identifier: Apache-2.0
// The kernels flush subnormals; the threads that run them must get their own mode back.
#include <gtest/gtest.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <cfenv>
#include <thread>

#include "problem.h"

namespace testing_latte {
namespace {

#if defined(__SSE2__)
constexpr uint64_t kFlushBits = 0x8040;
uint64_t mode() { return _mm_getcsr() & ~0x3Fu; }  // without the sticky exception flags
void set_mode(uint64_t bits) { _mm_setcsr(static_cast<unsigned>(bits)); }
#elif defined(__aarch64__)
constexpr uint64_t kFlushBits = uint64_t{1} << 24;
uint64_t mode() {
  uint64_t bits;
  asm volatile("mrs %0, fpcr" : "=r"(bits));
  return bits;
}
void set_mode(uint64_t bits) { asm volatile("msr fpcr, %0" : : "r"(bits)); }
#else
constexpr uint64_t kFlushBits = 0;
uint64_t mode() { return 0; }
void set_mode(uint64_t) {}
#endif

bool keeps_subnormals() {
  volatile float smallest = 0x1p-126f;
  volatile float half = smallest * 0.5f;  // flushed results are zero
  return half * 2.0f == smallest;         // and so are flushed operands
}

class RestoreMode {
 public:
  ~RestoreMode() { set_mode(saved_); }

 private:
  const uint64_t saved_ = mode();
};

// Forward, backward, step and merge, each followed by check(name).
template <class F>
void call_everything(int threads, F check) {
  for (const DType dtype : {DType::float32, DType::float64})
    for (const bool causal : {true, false}) {
      Case c;
      c.batch = 2, c.heads = 4, c.kv_heads = 2, c.tokens = 130, c.latents = 33, c.dim = 43;
      c.causal = causal, c.initial = causal, c.threads = threads;
      c.set_type(dtype);
      SCOPED_TRACE(c.text());
      Call call(c);
      call.forward(), check("forward");
      call.backward(), check("backward");
    }
  Case c;
  c.batch = 16, c.heads = c.kv_heads = 8, c.tokens = 1, c.latents = c.dim = 64, c.initial = true;
  Call call(c);
  run(call.step_params(), threads), check("step");
  latte::state_merge({call.initial.state(), call.initial.state(), call.initial.state()});
  check("merge");
}

TEST(FloatMode, IsTheCallersAfterEveryCall) {
  const uint64_t before = mode();
  ASSERT_TRUE(keeps_subnormals());
  for (const int threads : {1, 2})
    call_everything(threads, [&](const char* call) {
      EXPECT_EQ(mode(), before) << call << ", " << threads << " threads";
      EXPECT_TRUE(keeps_subnormals()) << call << ", " << threads << " threads";
    });
}

TEST(FloatMode, IsTheCallersAfterAnError) {
  const uint64_t before = mode();
  const Call call{Case()};
  auto params = call.forward_params();
  params.q.shape[3] += 1;
  EXPECT_THROW(latte::latent_attention_forward(params, nullptr, 1), latte::Error);
  EXPECT_EQ(mode(), before);
}

// What the caller chose stays, whichever way it differs from the default.
TEST(FloatMode, UnusualModesStay) {
  const RestoreMode restore;
  for (const bool flush : {false, true})
    for (const int rounding : {FE_TONEAREST, FE_TOWARDZERO, FE_UPWARD}) {
      std::fesetround(rounding);
      set_mode(flush ? mode() | kFlushBits : mode() & ~kFlushBits);
      const uint64_t before = mode();
      const Call call{Case()};
      std::vector<unsigned char> memory(latte::workspace_bytes(call.forward_params(), 1));
      latte::latent_attention_forward(call.forward_params(), memory.data(), 1);
      EXPECT_EQ(mode(), before) << "flush " << flush << ", rounding " << rounding;
      EXPECT_EQ(std::fegetround(), rounding);
    }
}

TEST(FloatMode, StaysInThreadsOfTheCaller) {
  std::thread([] {
    const uint64_t before = mode();
    call_everything(2, [&](const char* call) { EXPECT_EQ(mode(), before) << call; });
  }).join();
}

#if defined(_OPENMP)
// The library shares the runtime's worker threads with this program.
TEST(FloatMode, StaysInTheWorkerThreads) {
  static constexpr int kThreads = 4;
  const auto modes = [] {
    std::vector<uint64_t> all(kThreads);
#pragma omp parallel num_threads(kThreads)
    all[omp_get_thread_num()] = mode() << 1 | (keeps_subnormals() ? 1 : 0);
    return all;
  };
  const auto before = modes();
  for (const uint64_t worker : before) ASSERT_EQ(worker & 1, 1u);
  call_everything(kThreads, [&](const char* call) { EXPECT_EQ(modes(), before) << call; });
}
#endif

}  // namespace
}  // namespace testing_latte
