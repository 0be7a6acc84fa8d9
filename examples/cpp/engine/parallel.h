// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace engine {

/// Calls f(i) for i in [0, n), equal shares of neighbouring i on each of `threads` threads.
template <class F>
void parallel_for(int64_t n, int threads, F f) {
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && n > 1)
#endif
  for (int64_t i = 0; i < n; ++i) f(i);
  (void)threads;
}

}  // namespace engine
