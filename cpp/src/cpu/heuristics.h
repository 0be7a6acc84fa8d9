// SPDX-License-Identifier: Apache-2.0
// Sizes that are chosen, not derived: pure functions of the shape, so that a result never depends
// on timing, load or what else is in the batch (T7).
#pragma once

#include <cstdint>

namespace latte::cpu {

// Tokens per chunk. 32 to 128 run within 3 % of each other; 64 keeps the operands of L = D = 128
// in a quarter of a 1 MiB second-level cache.
inline constexpr int64_t kChunk = 64;

// Threads worth waking for `tasks` independent pieces of `flops` in all. Waking a team costs about
// as much as one core computes in 100 kflop.
constexpr int useful_threads(int64_t tasks, double flops, int threads) {
  const double worth = flops / 1e5;
  int64_t n = threads;
  n = n < tasks ? n : tasks;
  n = static_cast<double>(n) < worth ? n : static_cast<int64_t>(worth);
  return n < 1 ? 1 : static_cast<int>(n);
}

}  // namespace latte::cpu
