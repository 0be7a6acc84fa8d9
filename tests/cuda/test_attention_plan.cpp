// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "cuda/keys.cuh"

namespace latte::cuda {
namespace {

TEST(AttentionPlan, LatentTilesHoldTheLatents) {
  int before = 0;
  for (int64_t latents = 1; latents <= kMaxLatents; ++latents) {
    const int tile = latent_tile(latents);
    EXPECT_GE(tile, latents);
    EXPECT_LT(tile, latents <= 16 ? 17 : 2 * latents);
    EXPECT_GE(tile, before);
    before = tile;
  }
}

// A multiprocessor has 227 KiB; an A100 gives one block 163.
template <class E>
void expect_shared_memory_fits() {
  constexpr bool kBfloat16 = std::is_same_v<E, __nv_bfloat16>;
  const auto bytes = [](auto tile) {
    constexpr int kLatents = decltype(tile)::value;
    return KernelShape<E, kLatents, value_slice(kLatents, kBfloat16),
                       kKeys | kQueries | kState>::kSharedBytes;
  };
  const auto two_blocks = 113 * 1024;
  EXPECT_LE(bytes(std::integral_constant<int, 16>()), two_blocks);
  EXPECT_LE(bytes(std::integral_constant<int, 32>()), two_blocks);
  EXPECT_LE(bytes(std::integral_constant<int, 64>()), two_blocks);
  EXPECT_LE(bytes(std::integral_constant<int, 128>()), two_blocks);
  EXPECT_LE(bytes(std::integral_constant<int, 256>()), (kBfloat16 ? 113 : 227) * 1024);
}
TEST(AttentionPlan, SharedMemoryFits) {
  expect_shared_memory_fits<__nv_bfloat16>();
  expect_shared_memory_fits<__half>();
  expect_shared_memory_fits<float>();
}

// The second read of k and v pays only where at least half of the device would be idle.
TEST(AttentionPlan, CutsOnlyFewAndLongSequences) {
  EXPECT_EQ(causal_segments(8 * 16, 4096), 1);
  EXPECT_EQ(causal_segments(67, 1 << 20), 1);
  EXPECT_EQ(causal_segments(66, 1 << 20), 4);
  EXPECT_EQ(causal_segments(16, 65536), 16);
  EXPECT_EQ(causal_segments(1, 511), 1);
  EXPECT_EQ(causal_segments(1, 512), 2);
  EXPECT_EQ(causal_segments(0, 0), 1);
  for (int64_t blocks = 1; blocks < 400; ++blocks)
    for (const int64_t tokens : {0, 1, 300, 4096, 65536}) {
      const int64_t segments = causal_segments(blocks, tokens);
      EXPECT_TRUE(segments == 1 || segments * blocks <= kWantedBlocks);
      EXPECT_TRUE(segments == 1 || segments * kMinSegmentTokens <= tokens);
      const int64_t parts = token_parts(blocks, tokens);
      EXPECT_TRUE(parts == 1 || (parts - 1) * blocks < kWantedBlocks);
    }
}

}  // namespace
}  // namespace latte::cuda
