// SPDX-License-Identifier: Apache-2.0
// The measured peak: float32 multiply-adds of the instruction set in use, per second.
#include <chrono>
#include <ctime>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "latte/latte.h"

namespace latte {
namespace {

// Some 0.2 ms between two looks at the clock, which costs a system call.
constexpr int64_t kBlock = 65536;

// The calling thread's own time: one that another process displaces does not seem slower.
double cpu_seconds() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
#else
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

}  // namespace

double fma_rate(int threads, double seconds) {
  if (threads < 1 || !(seconds > 0))
    throw Error(Error::Kind::value, "[fma_rate] got threads " + std::to_string(threads) +
                                        " and seconds " + std::to_string(seconds) +
                                        ", expected threads >= 1 and seconds > 0");
  const auto run = cpu::kernels().fma_flops;
  std::vector<double> rates(static_cast<size_t>(threads));
  cpu::parallel_for(threads, threads, [&](int64_t i, int) {
    const double begin = cpu_seconds();
    double flops = 0, elapsed = 0;
    do {
      flops += run(kBlock);
      elapsed = cpu_seconds() - begin;
    } while (elapsed < seconds);
    rates[static_cast<size_t>(i)] = flops / elapsed;
  });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

}  // namespace latte
