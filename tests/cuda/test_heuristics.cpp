// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "cuda/heuristics.h"

namespace latte::cuda {
namespace {

TEST(Segments, CutOnlyWhatDoesNotFillTheDevice) {
  EXPECT_EQ(scan_segment(8 * 4096, 4096), 2048);  // half of the device: two segments
  EXPECT_EQ(scan_segment(8 * 4096 + 1, 4096), 4096);
  EXPECT_EQ(scan_segment(1, 511), 511);  // too short
  EXPECT_EQ(scan_segment(1, 512), 256);
  EXPECT_EQ(scan_segment(1, 0), 1);
  EXPECT_EQ(scan_segment(0, 0), 1);
}

TEST(Segments, CoverEveryTokenInWholeTiles) {
  for (const int64_t columns : {1, 100, 2048, 30000})
    for (int64_t tokens = 1; tokens < 200000; tokens = tokens * 3 / 2 + 1) {
      const int64_t segment = scan_segment(columns, tokens), count = ceil_div(tokens, segment);
      EXPECT_LE(count, kMaxSegments) << columns << " " << tokens;
      EXPECT_TRUE(count == 1 || segment >= kMinSegment) << columns << " " << tokens;
      EXPECT_TRUE(count == 1 || segment % kLargestTile == 0) << columns << " " << tokens;
    }
}

TEST(Runs, HoldWholeTiles) {
  EXPECT_EQ(conv_tokens(1, 1), kMinConvTokens);
  EXPECT_EQ(conv_tokens(int64_t{1} << 30, 4096), kMaxConvTokens);
  for (int64_t tokens = 1; tokens < 100000; tokens = tokens * 3 / 2 + 1)
    EXPECT_EQ(conv_tokens(tokens, 512) % kLargestTile, 0) << tokens;
}

TEST(Step, SlicesOnlyLargeStatesOfFewHeads) {
  EXPECT_EQ(step_slices(16, 64, 64), 1);     // 16 KiB per head: one block takes it all at once
  EXPECT_EQ(step_slices(16, 256, 256), 4);   // 256 KiB
  EXPECT_EQ(step_slices(512, 256, 256), 1);  // enough blocks without
  EXPECT_EQ(step_slices(0, 256, 256), 4);
  EXPECT_EQ(step_slices(1, 512, 32), 1);  // one slice is the least that threads walk together
}

TEST(Rotation, GroupsFillTheDevice) {
  EXPECT_EQ(rotate_groups(1, 8), 8);
  EXPECT_EQ(rotate_groups(64, 8), 4);
  EXPECT_EQ(rotate_groups(1 << 20, 8), 1);
}

}  // namespace
}  // namespace latte::cuda
