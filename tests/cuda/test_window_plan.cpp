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

// A multiprocessor has 227 KiB, of which two blocks get half each; an A100 gives one block 163.
template <class E>
void expect_shared_memory_fits() {
  const int64_t two_blocks = 113 * 1024;
  EXPECT_LE((WindowShape<E, 32, 1>::kSharedBytes), two_blocks);
  EXPECT_LE((WindowShape<E, 128, 1>::kSharedBytes), two_blocks);
  EXPECT_LE((WindowShape<E, 256, 1>::kSharedBytes), two_blocks);
  EXPECT_LE((WindowShape<E, 32, 2>::kSharedBytes), two_blocks);
  EXPECT_LE((WindowShape<E, 128, 2>::kSharedBytes), two_blocks);
  EXPECT_LE((WindowShape<E, 256, 2>::kSharedBytes), sizeof(E) == 2 ? two_blocks : 163 * 1024);
}
TEST(WindowPlan, SharedMemoryFits) {
  expect_shared_memory_fits<float>();
  expect_shared_memory_fits<__nv_bfloat16>();
  expect_shared_memory_fits<__half>();
}

}  // namespace
}  // namespace latte::cuda
