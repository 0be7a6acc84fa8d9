// SPDX-License-Identifier: Apache-2.0
// The only file that knows OpenMP.
#pragma once

#include <cstdint>

#if defined(LATTE_OPENMP)
#include <omp.h>
#if !defined(_WIN32)
#include <pthread.h>
#endif
#endif

namespace latte::cpu {

#if defined(LATTE_OPENMP)
inline constexpr bool kThreaded = true;

// A child of fork() has none of the parent's team, and libgomp waits for it for ever: run serially.
inline bool& in_forked_child() {
  static bool forked = false;
  return forked;
}
inline void watch_forks() {
#if !defined(_WIN32)  // which has no fork()
  static const int registered = pthread_atfork(nullptr, nullptr, [] { in_forked_child() = true; });
  (void)registered;
#endif
}
#else
inline constexpr bool kThreaded = false;
#endif

// Calls f(i, thread) for i in [0, n), thread in [0, threads), `grain` consecutive i by the same
// thread. The caller gives the thread count; OpenMP's own settings are never changed, and inside a
// parallel region the loop is serial.
template <class F>
void parallel_for(int64_t n, int threads, F f, int64_t grain = 1) {
#if defined(LATTE_OPENMP)
  watch_forks();
  if (threads > 1 && n > 1 && !omp_in_parallel() && !in_forked_child()) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, grain)
    for (int64_t i = 0; i < n; ++i) f(i, omp_get_thread_num());
    return;
  }
#endif
  (void)threads, (void)grain;
  for (int64_t i = 0; i < n; ++i) f(i, 0);
}

}  // namespace latte::cpu
