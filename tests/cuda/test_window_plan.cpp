// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "cuda/window.cuh"

namespace latte::cuda {
namespace {

// Every sequence begins in a tile of its own, and there is one for each of its tiles.
TEST(WindowPlan, SlotsHoldEverySequence) {
  for (int64_t first = 0; first < 200; first += 3)
    for (int64_t rows = 0; rows < 200; ++rows) {
      const int64_t own = ceil_div(rows, kOwnRows);
      const int64_t slot = first / kOwnRows;
      EXPECT_LE(slot + own, (first + rows) / kOwnRows + 1);
      EXPECT_LE(slot + own, tile_slots(first + rows, 1, true));
    }
}

// Sinks at the ends of int64 are far away, not near.
TEST(WindowPlan, DistancesDoNotOverflow) {
  constexpr int64_t kEnd = INT64_MAX;
  EXPECT_TRUE(is_distant(kEnd, -kEnd - 1, kEnd, true));
  EXPECT_FALSE(is_distant(-kEnd - 1, kEnd, 1, true));
  EXPECT_TRUE(is_distant(-kEnd - 1, kEnd, kEnd, false));
  EXPECT_TRUE(is_distant(7, 3, 4, true));
  EXPECT_FALSE(is_distant(7, 3, 5, true));
  EXPECT_FALSE(is_distant(3, 7, 5, false));
}

// Every kernel fits on every device, but the gradient of more than 128 channels of float32 on the
// smallest; two blocks of the others are resident on sm_90.
TEST(WindowPlan, EveryShapeFits) {
  for (const int64_t element : {2, 4})
    for (int64_t channels = 1; channels <= kMaxDim; ++channels) {
      const int tile = channel_tile(channels);
      EXPECT_GE(tile, channels);
      EXPECT_GE(ceil_div(channels, gradient_slice(tile)) * gradient_slice(tile), channels);
      for (const int owned : {1, 2})
        for (const int64_t limit : kSharedLimits) {
          const WindowBytes b = window_bytes(element, tile, owned);
          const int count = stages(b.stage, b.own, limit);
          const bool large = element == 4 && tile == 256 && owned == 2;
          EXPECT_EQ(count > 0, !large || limit > 99 * 1024) << element << " " << channels;
          EXPECT_LE(b.total(count), limit + (count == 0) * b.own);
          EXPECT_EQ(b.streamed % 16, 0);
          if (limit == 227 * 1024 && !large) EXPECT_EQ(resident_blocks(b.total(count), limit), 2);
        }
    }
}

}  // namespace
}  // namespace latte::cuda
