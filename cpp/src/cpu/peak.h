// SPDX-License-Identifier: Apache-2.0
// The ceiling of a kernel: float32 multiply-adds that never wait for memory or for each other.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace latte::LATTE_ISA {

// Latency times units is 8 on x86 and 16 on wide Arm cores; beyond 12 chains, 16 registers spill.
#if LATTE_VECTOR_BYTES == 64 || defined(LATTE_NEON)
inline constexpr int kPeakChains = 24;
#else
inline constexpr int kPeakChains = 12;
#endif

// Does `iterations` rounds of one multiply-add per chain; returns the number of operations, two per
// lane. Without fused multiply-add the same two are a multiplication and an addition.
inline double fma_flops(int64_t iterations) {
  VecF chain[kPeakChains];
  for (int c = 0; c < kPeakChains; ++c) chain[c] = splat(static_cast<float>(-c));
  const VecF factor = splat(0.5f), addend = splat(1.0f);  // to 2: no overflow, no subnormal
  for (int64_t i = 0; i < iterations; ++i)
#pragma GCC unroll 24
    for (int c = 0; c < kPeakChains; ++c) chain[c] = chain[c] * factor + addend;
  volatile float used = 0;  // so that every lane of every chain counts as used
  for (int c = 0; c < kPeakChains; ++c) used = used + reduce_add<float>(chain[c]);
  return 2.0 * kPeakChains * kLanes<float> * static_cast<double>(iterations);
}

}  // namespace latte::LATTE_ISA
