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

constexpr DType kDeviceTypes[] = {DType::float32, DType::bfloat16, DType::float16};

// Every L and D on every device: blocks cover them, and one at least is resident.
TEST(AttentionPlan, EveryShapeFitsOnEveryDevice) {
  for (const int64_t limit : kSharedLimits)
    for (const DType dtype : kDeviceTypes)
      for (int64_t latents = 1; latents <= kMaxLatents; ++latents) {
        const int tile = forward_latents(latents, dtype, limit);
        const int own = gradient_latents(latents, dtype, limit);
        EXPECT_LE(tile, latent_tile(latents));
        EXPECT_LE(own, latent_tile(latents));
        // The sizes that have kernels.
        EXPECT_EQ(latent_tile(tile), tile);
        EXPECT_EQ(latent_tile(own), own);
        EXPECT_LE(own, 64);
        const auto fits = [&](int block_latents, int channels, int contents) {
          const SharedBytes b =
              shared_bytes(element_bytes(dtype), block_latents, channels, contents);
          const int count = stages(b.stage, b.other(), limit);
          return count > 0 && b.total(count) <= limit;
        };
        const int slice = value_slice(tile, dtype);
        for (const int contents : {int{kKeys}, kForwardContents, kMeanContents})
          EXPECT_TRUE(fits(tile, slice, contents)) << limit << " " << latents << " " << contents;
        for (const int contents :
             {query_gradient_contents(dtype), kQuerySumContents, kMeanGradientContents,
              kKeyGradientContents, kRecallingContents, kMeanKeyContents})
          EXPECT_TRUE(fits(own, kGradientChannels, contents))
              << limit << " " << latents << " " << contents;
        for (int64_t dim = 1; dim <= kMaxDim; ++dim) {
          EXPECT_GE(ceil_div(dim, slice) * slice, dim);
          EXPECT_LT((ceil_div(dim, slice) - 1) * slice, dim);
        }
      }
}

// Two blocks of every kernel are resident on sm_90, except where the state of 256 latents is.
TEST(AttentionPlan, TwoBlocksOnTheLargestDevice) {
  for (const DType dtype : kDeviceTypes)
    for (const int64_t latents : {16, 32, 64, 128, 256}) {
      const int tile = forward_latents(latents, dtype, 227 * 1024);
      const SharedBytes b =
          shared_bytes(element_bytes(dtype), tile, value_slice(tile, dtype), kForwardContents);
      EXPECT_EQ(resident_blocks(b.total(stages(b.stage, b.other(), 227 * 1024)), 227 * 1024), 2);
      EXPECT_EQ(tile, dtype == DType::bfloat16 ? latents : least(latents, 128));
    }
}

TEST(AttentionPlan, StagesKeepTheSecondBlock) {
  const int64_t limit = 100 * 1024;
  EXPECT_EQ(stages(20 * 1024, 9 * 1024, limit), 2);   // two blocks of 49 KiB
  EXPECT_EQ(stages(21 * 1024, 9 * 1024, limit), 1);   // two blocks of 30 KiB, or one of 51
  EXPECT_EQ(stages(30 * 1024, 40 * 1024, limit), 2);  // one block, of 100 KiB
  EXPECT_EQ(stages(31 * 1024, 40 * 1024, limit), 1);
  EXPECT_EQ(stages(61 * 1024, 40 * 1024, limit), 0);
}

// The kernels are compiled with the sizes of the plan.
template <class E, int kLatents>
void expect_plan_of_kernels() {
  constexpr int kSlice = value_slice(kLatents, kDType<E>);
  using Shape = KernelShape<E, kLatents, kSlice, kForwardContents>;
  const SharedBytes b = shared_bytes(element_bytes(kDType<E>), kLatents, kSlice, kForwardContents);
  EXPECT_EQ(Shape::kBytes.total(2), b.total(2));
  EXPECT_EQ(Shape::kBytes.latent_rows, int64_t{kChunk * Shape::kLStride * sizeof(E)});
  EXPECT_EQ(Shape::kBytes.factor_rows,
            int64_t{kChunk * Shape::kWeightStride * sizeof(typename Shape::Factor)});
  EXPECT_EQ(Shape::kBytes.stage % 16, 0);
  EXPECT_EQ(Shape::kBytes.other() % 16, 0);
}
TEST(AttentionPlan, SizesOfKernels) {
  expect_plan_of_kernels<float, 128>();
  expect_plan_of_kernels<__half, 128>();
  expect_plan_of_kernels<__half, 16>();
  expect_plan_of_kernels<__nv_bfloat16, 256>();
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
  EXPECT_EQ(causal_segments(1, 512, {1, 256}), 1);
  EXPECT_EQ(causal_segments(1, 512, {4, 64}), 4);
  EXPECT_EQ(token_parts(3, 512, {4, 64}), 2);
  for (int64_t blocks = 1; blocks < 400; ++blocks)
    for (const int64_t tokens : {0, 1, 300, 4096, 65536}) {
      const int64_t segments = causal_segments(blocks, tokens);
      EXPECT_TRUE(segments == 1 || segments * blocks <= kTuned.wanted_blocks);
      EXPECT_TRUE(segments == 1 || segments * kTuned.min_segment_tokens <= tokens);
      const int64_t parts = token_parts(blocks, tokens);
      EXPECT_TRUE(parts == 1 || (parts - 1) * blocks < kTuned.wanted_blocks);
    }
}

}  // namespace
}  // namespace latte::cuda
