// SPDX-License-Identifier: Apache-2.0
// The sizes that are chosen: cuts cover a sequence once, in order, in the proportions that balance.
#include <gtest/gtest.h>

#include "cpu/heuristics.h"

namespace latte::cpu {
namespace {

TEST(Heuristics, ThreadsFollowTheWork) {
  EXPECT_EQ(useful_threads(0, 8), 1);
  EXPECT_EQ(useful_threads(99e3, 8), 1);
  EXPECT_EQ(useful_threads(350e3, 8), 3);
  EXPECT_EQ(useful_threads(1e12, 8), 8);
  EXPECT_EQ(useful_threads(1e300, 1), 1);
}

TEST(Heuristics, EnoughEqualSequencesAreNeverCut) {
  for (int threads = 1; threads <= 64; ++threads)
    for (int64_t tasks = threads; tasks <= 2 * threads; ++tasks)
      EXPECT_EQ(parts(1 << 20, tasks << 20, threads), 1);
}

TEST(Heuristics, ALongSequenceTakesItsShareOfTheThreads) {
  EXPECT_EQ(parts(65536, 65536, 2), 2);
  EXPECT_EQ(parts(65536, 65536, 16), 16);
  EXPECT_EQ(parts(65536, 2 * 65536, 16), 8);
  EXPECT_EQ(parts(60000, 65536, 2), 1);
  EXPECT_EQ(parts(60000, 65536, 4), 3);
  EXPECT_EQ(parts(2 * kMinPart - 1, 2 * kMinPart - 1, 8), 1);
  EXPECT_EQ(parts(2 * kMinPart, 2 * kMinPart, 8), 2);
  EXPECT_EQ(parts(0, 0, 8), 1);
}

TEST(Heuristics, HeadsAreWalkedTogetherWhereNoThreadWaitsForIt) {
  EXPECT_EQ(heads_together(1, 8, 1), kHeadsTogether);
  EXPECT_EQ(heads_together(1, 8, 2), 2);
  EXPECT_EQ(heads_together(2, 8, 2), kHeadsTogether);
  EXPECT_EQ(heads_together(1, 16, 1), 2);
  EXPECT_EQ(heads_together(1, 8, 8), 1);
  EXPECT_EQ(heads_together(1, 6, 2), 1);
  EXPECT_EQ(heads_together(3, 1, 1), 1);
  EXPECT_EQ(heads_together(0, 8, 2), kHeadsTogether);
}

using Cut = int64_t (*)(int64_t, int64_t, int64_t);

void expect_cover(Cut cut, int64_t segments, int64_t n, int64_t tokens) {
  EXPECT_EQ(cut(0, n, tokens), 0);
  EXPECT_EQ(cut(segments, n, tokens), tokens);
  for (int64_t i = 0; i < segments; ++i) {
    EXPECT_LT(cut(i, n, tokens), cut(i + 1, n, tokens));
    EXPECT_EQ(cut(i, n, tokens) % kChunk, 0);
  }
}

TEST(Heuristics, SegmentsCoverTheSequence) {
  for (int64_t n = 2; n <= 64; ++n)
    for (const int64_t tokens : {n * kMinPart, n * kMinPart + 1, int64_t{1} << 22}) {
      expect_cover(forward_cut, n + 1, n, tokens);
      expect_cover(reverse_cut, n + 1, n, tokens);
      expect_cover(even_cut, n, n, tokens);
    }
}

// What a phase costs is its longest stage: T / 5 scanned beside 2 T / 5 summarised, and so on.
TEST(Heuristics, TwoThreadsGainTheirLimit) {
  const int64_t t = 1 << 20;
  const double scan = 4, summary = 2;
  const double first = scan * forward_cut(1, 2, t);
  const double beside = summary * (forward_cut(2, 2, t) - forward_cut(1, 2, t));
  const double rest = scan * (t - forward_cut(2, 2, t));
  EXPECT_NEAR(first / beside, 1, 1e-3);
  EXPECT_NEAR(scan * t / (first + rest), 5.0 / 3, 1e-3);
  const double last = 8.0 * (t - reverse_cut(2, 2, t));
  const double before = summary * (reverse_cut(2, 2, t) - reverse_cut(1, 2, t));
  EXPECT_NEAR(last / before, 1, 1e-3);
  EXPECT_NEAR(8.0 * t / (last + 8.0 * reverse_cut(1, 2, t)), 9.0 / 5, 1e-3);
}

TEST(Heuristics, BlocksOfChannels) {
  using latte::cpu::channel_blocks;
  EXPECT_EQ(channel_blocks(512, 1, 1), 1);
  EXPECT_EQ(channel_blocks(513, 1, 1), 2);
  EXPECT_EQ(channel_blocks(512, 1, 4), 4);    // enough for the threads,
  EXPECT_EQ(channel_blocks(512, 4, 4), 1);    // which sequences may be already,
  EXPECT_EQ(channel_blocks(512, 1, 100), 8);  // but none too narrow
  EXPECT_EQ(channel_blocks(5, 1, 100), 1);
  EXPECT_EQ(channel_blocks(5, 0, 4), 1);
}

TEST(Heuristics, SegmentsOfConvolutions) {
  using latte::cpu::conv_segments;
  EXPECT_EQ(conv_segments(0, 0), 1);
  EXPECT_EQ(conv_segments(255, 1), 1);
  EXPECT_EQ(conv_segments(1024, 1), 4);
  EXPECT_EQ(conv_segments(1 << 20, 1), 64);
  EXPECT_EQ(conv_segments(1 << 20, 32), 2);
  EXPECT_EQ(conv_segments(1 << 20, 64), 1);
}

}  // namespace
TEST(Heuristics, PiecesOfSinksAreBlocks) {
  for (const int64_t tokens : {int64_t{0}, int64_t{1}, int64_t{40000}, int64_t{1} << 33}) {
    const int64_t piece = cpu::sink_piece(tokens);
    EXPECT_GE(piece, 512);
    EXPECT_EQ(piece % cpu::kWindowQueries, 0);
    EXPECT_LE(tokens / piece, 64);
  }
}
TEST(Heuristics, WindowSegmentsAreBlocksAndFewWindowsAreMetTwice) {
  for (const int64_t total : {int64_t{0}, int64_t{1}, int64_t{5000}, int64_t{1} << 33})
    for (const int64_t window : {1, 128, 5000})
      for (const int threads : {1, 2, 64}) {
        const int64_t length = cpu::window_segment(total, window, threads);
        ASSERT_GE(length, 1);
        if (threads == 1) {
          EXPECT_GE(length, total);
        } else {
          EXPECT_EQ(length % cpu::kWindowKeys, 0);
          EXPECT_GE(length, 4 * window);
        }
      }
}

TEST(Heuristics, StepsKeepStatesTogetherAndThreadsBusy) {
  EXPECT_EQ(step_grain(8, 2), 1);
  EXPECT_EQ(step_grain(320, 2), 10);
  EXPECT_EQ(step_grain(1 << 20, 2), 64);
  for (int64_t heads = 1; heads < 5000; heads += 7)
    for (const int threads : {1, 2, 3, 16, 64})
      if (heads >= 16 * threads) {
        EXPECT_LE(step_grain(heads, threads) * 16 * threads, heads);
      }
}

}  // namespace latte::cpu
