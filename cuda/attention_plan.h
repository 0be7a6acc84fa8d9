// SPDX-License-Identifier: Apache-2.0
// Tiles and grids of latent attention: pure functions of the shape, as in heuristics.h.
#pragma once

#include <cstdint>

#include "cuda/heuristics.h"

namespace latte::cuda {

// A block walks its tokens in chunks; each of its four warps owns 16 rows of the chunk's queries.
inline constexpr int kChunk = 64;
inline constexpr int kAttentionThreads = 128;
inline constexpr int64_t kMaxLatents = 256, kMaxDim = 256;

// Weights exp(k - running maximum) reach down to e^-60 of a latent's first key: products with
// 1 / normaliser stay finite in bfloat16 and TF32. A chunk that spans more is walked row by row.
inline constexpr float kMaxRange = 60.0f;

// The latents of a kernel.
constexpr int latent_tile(int64_t latents) {
  return latents <= 16 ? 16 : latents <= 32 ? 32 : latents <= 64 ? 64 : latents <= 128 ? 128 : 256;
}

// The channels of a block, as many as its registers hold beside the factors of a row. Other slices
// of D belong to other blocks, which find the same q and k in the L2 cache.
constexpr int value_slice(int latent_tile, bool is_bfloat16) {
  return latent_tile <= (is_bfloat16 ? 128 : 64) ? 64 : 32;
}

// The channels and latents of a block of the backward pass, whose walks cut both: registers hold S
// or dS, or both, and shared memory five kinds of rows.
inline constexpr int kGradientChannels = 64;
constexpr int gradient_latents(int64_t latents) {
  return static_cast<int>(least(latent_tile(latents), 64));
}

// Two stages of input while two blocks still fit in the 227 KiB of a multiprocessor: with one stage
// they overlap each other's loads instead.
constexpr int stages(int64_t stage_bytes, int64_t other_bytes) {
  return 2 * stage_bytes + other_bytes <= 113 * 1024 ? 2 : 1;
}

// Blocks of a full device: two on each of the 132 multiprocessors of an H100.
inline constexpr int64_t kWantedBlocks = 264;
inline constexpr int64_t kMinSegmentTokens = 256;

// Segments of a causal sequence. More than one costs a second pass over k and v, 1.5 times the
// bytes, so there is one unless it leaves at least half of the multiprocessors without a block.
constexpr int64_t causal_segments(int64_t blocks, int64_t tokens) {
  const int64_t count = least(kWantedBlocks / most(blocks, 1), tokens / kMinSegmentTokens);
  return count < 2 || 4 * blocks > kWantedBlocks ? 1 : count;
}
// Parts of a pass over independent tokens.
constexpr int64_t token_parts(int64_t blocks, int64_t tokens) {
  const int64_t wanted = ceil_div(kWantedBlocks, most(blocks, 1));
  return most(least(wanted, ceil_div(tokens, kMinSegmentTokens)), 1);
}

}  // namespace latte::cuda
