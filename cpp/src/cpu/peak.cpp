// SPDX-License-Identifier: Apache-2.0
// The measured peak: float32 multiply-adds of the instruction set in use, per second.
#include <atomic>
#include <chrono>
#include <ctime>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "latte/latte.h"

namespace latte {
namespace {

constexpr int64_t kBlock = 1 << 12;  // some 20 microseconds between two looks at the clock

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Of this thread: a thread that another process displaces does not seem slower.
double cpu_seconds() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
#else
  return wall_seconds();
#endif
}

}  // namespace

double fma_rate(int threads, double seconds) {
  if (threads < 1 || !(seconds > 0))
    throw Error(Error::Kind::value, "[fma_rate] got threads " + std::to_string(threads) +
                                        " and seconds " + std::to_string(seconds) +
                                        ", expected threads >= 1 and seconds > 0");
  double (*const clock)() = threads == 1 ? cpu_seconds : wall_seconds;
  const auto run = cpu::kernels().fma_flops;
  const double begin = clock(), end = begin + seconds;
  std::atomic<int64_t> blocks{0};
  double block_flops = 0;
  cpu::parallel_for(threads, threads, [&](int64_t i, int) {
    do {
      const double flops = run(kBlock);
      if (i == 0) block_flops = flops;
      blocks.fetch_add(1, std::memory_order_relaxed);
    } while (clock() < end);
  });
  return block_flops * static_cast<double>(blocks.load()) / (clock() - begin);
}

}  // namespace latte
