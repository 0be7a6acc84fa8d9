// SPDX-License-Identifier: Apache-2.0
// Tiles and grids of latent attention: pure functions of the shape, as in heuristics.h.
#pragma once

#include <cstdint>

#include "cuda/heuristics.h"
#include "cuda/tuned.h"
#include "latte/latte.h"

namespace latte::cuda {

// A block walks its tokens in chunks; each of its four warps owns 16 rows of the chunk's queries.
inline constexpr int kChunk = 64;
inline constexpr int kAttentionThreads = 128;
inline constexpr int64_t kMaxLatents = 256, kMaxDim = 256;

// Weights exp(k - running maximum) reach down to e^-60 of a latent's first key: products with
// 1 / normaliser stay finite in bfloat16 and TF32. A chunk that spans more is walked row by row.
inline constexpr float kMaxRange = 60.0f;

// Dynamic shared memory that a block may have: of sm_80 and 87, of sm_90 and 100, of sm_86, 89 and
// 120. A multiprocessor has 1 KiB more, of which every block takes 1 KiB beside its own.
inline constexpr int64_t kSharedLimits[] = {163 * 1024, 227 * 1024, 99 * 1024};
// Blocks that share a multiprocessor. Registers hold two: 128 threads of at most 255 each.
constexpr int64_t resident_blocks(int64_t shared_bytes, int64_t limit) {
  return least((limit + 1024) / (shared_bytes + 1024), 2);
}

// Stages of input, while as many blocks stay resident: two blocks with one stage each overlap each
// other's loads instead. 0: not even one fits.
constexpr int stages(int64_t stage_bytes, int64_t other_bytes, int64_t limit) {
  const int64_t one = resident_blocks(stage_bytes + other_bytes, limit);
  return one == 0 ? 0 : resident_blocks(2 * stage_bytes + other_bytes, limit) == one ? 2 : 1;
}

// What a kernel has in shared memory, added up: keys and values, queries, dy, the factors of the
// backward pass (gradient.cuh), a state or its gradient, the sum of a gradient, dp of a chunk, and
// queries and dq in the place of the factors, which the block then finds itself.
enum Contents : int {
  kKeys = 1,
  kQueries = 2,
  kOutputs = 4,
  kFactors = 8,
  kState = 16,
  kSum = 32,
  kSlopes = 64,
  kRecalled = 128
};
inline constexpr int kForwardContents = kKeys | kQueries | kState;
inline constexpr int kMeanContents = kQueries | kState;  // bidirectional, after the summary
// dp waits for the sum over its row: in registers, or where float32 fills them, in shared memory.
constexpr int query_gradient_contents(DType dtype) {
  return kKeys | kQueries | kOutputs | kState | (dtype == DType::float32 ? kSlopes : 0);
}
inline constexpr int kQuerySumContents = kKeys | kQueries | kOutputs | kState | kSum;
inline constexpr int kMeanGradientContents = kMeanContents | kOutputs | kSum;
inline constexpr int kKeyGradientContents = kKeys | kOutputs | kFactors | kState;
inline constexpr int kRecallingContents = kKeyGradientContents | kRecalled;
// Of what the queries' half has left in dq alone, if inputs have the type of factors. Where dq is
// float16, its least numbers would be too coarse.
constexpr bool recalls_factors(DType dtype) { return dtype != DType::float16; }
inline constexpr int kMeanKeyContents = kKeys | kState;

// Rows are 16 bytes longer than they need, which keeps eight of them on different banks.
inline constexpr int kRowPadding = 16;

// Bytes of an element of the inputs and of a factor of their products (tile.cuh).
struct ElementBytes {
  int64_t input, factor;
};
constexpr ElementBytes element_bytes(DType dtype) {
  const int64_t input = dtype == DType::float32 ? 4 : 2;
  return {input, dtype == DType::bfloat16 ? 2 : 4};
}

// Shared memory of a block with these contents, of so many latents and channels.
struct SharedBytes {
  int64_t latent_rows, channel_rows, factor_rows;  // of a chunk
  int64_t weights, spread, slopes, state, books;   // 0 where there is none
  int64_t stage;                                   // the inputs of a chunk

  constexpr int64_t other() const { return weights + spread + slopes + state + books; }
  constexpr int64_t total(int64_t stages) const { return other() + stages * stage; }
};
constexpr SharedBytes shared_bytes(ElementBytes e, int64_t latents, int64_t channels,
                                   int contents) {
  const auto has = [&](int what) { return int64_t{(contents & what) != 0}; };
  SharedBytes b{};
  b.latent_rows = kChunk * (latents * e.input + kRowPadding);
  b.channel_rows = kChunk * (channels * e.input + kRowPadding);
  b.factor_rows = kChunk * (latents * e.factor + kRowPadding);
  b.stage = has(kQueries) * b.latent_rows + has(kKeys) * (b.latent_rows + b.channel_rows + kChunk) +
            has(kOutputs) * b.channel_rows + has(kFactors) * 2 * b.factor_rows;
  // Weights take the place of keys of their size.
  b.weights = has(kKeys) * int64_t{e.input != e.factor} * b.factor_rows;
  b.spread = has(kSum) * b.factor_rows;
  b.slopes = has(kSlopes) * b.factor_rows;
  b.state = has(kState) * latents * (channels * e.factor + kRowPadding);
  // Four numbers per latent, two per warp and latent, one per warp and channel; of a sum, and of
  // the norm before a chunk whose factors are found again, one more per latent.
  b.books = ((has(kKeys) | has(kOutputs)) * (12 * latents + 4 * channels) +
             (has(kSum) | has(kRecalled)) * latents) *
            int64_t{sizeof(float)};
  return b;
}

// The latents of a kernel.
constexpr int latent_tile(int64_t latents) {
  return latents <= 16 ? 16 : latents <= 32 ? 32 : latents <= 64 ? 64 : latents <= 128 ? 128 : 256;
}

// The channels of a block, as many as its registers hold beside the state. Other slices of D belong
// to other blocks, which find the same q and k in the L2 cache.
constexpr int value_slice(int latent_tile, DType dtype) {
  return latent_tile <= (dtype == DType::bfloat16 ? 128 : 64) ? 64 : 32;
}

// Latents are cut into slices as well where a block cannot hold all of them: each then leaves a
// part of y in float32, and a pass of its own finds the softmax of q first. Beyond 128 latents
// float16 and float32 would leave no room for a second block on any device.
constexpr int forward_latents(int64_t latents, DType dtype, int64_t limit) {
  int tile = latent_tile(least(latents, dtype == DType::bfloat16 ? 256 : 128));
  const auto bytes = [&] {
    return shared_bytes(element_bytes(dtype), tile, value_slice(tile, dtype), kForwardContents);
  };
  while (tile > 16 && bytes().total(1) > limit) tile /= 2;
  return tile;
}

// The channels and latents of a block of the backward pass, whose walks cut both: registers hold S
// or dS, or both, and shared memory five kinds of rows.
inline constexpr int kGradientChannels = 64;
constexpr int gradient_latents(int64_t latents, DType dtype, int64_t limit) {
  int tile = latent_tile(least(latents, 64));
  const auto bytes = [&](int contents) {
    return shared_bytes(element_bytes(dtype), tile, kGradientChannels, contents).total(1);
  };
  while (tile > 16 && most(most(bytes(kRecallingContents), bytes(kQuerySumContents)),
                           bytes(query_gradient_contents(dtype))) > limit)
    tile /= 2;
  return tile;
}

// Segments of a causal sequence. More than one costs a second pass over k and v, 1.5 times the
// bytes, so there is one unless it leaves at least half of the multiprocessors without a block.
constexpr int64_t causal_segments(int64_t blocks, int64_t tokens, const Tuning& t = kTuned) {
  const int64_t count = least(t.wanted_blocks / most(blocks, 1), tokens / t.min_segment_tokens);
  return count < 2 || 4 * blocks > t.wanted_blocks ? 1 : count;
}
// Parts of a pass over independent tokens.
constexpr int64_t token_parts(int64_t blocks, int64_t tokens, const Tuning& t = kTuned) {
  const int64_t wanted = ceil_div(t.wanted_blocks, most(blocks, 1));
  return most(least(wanted, ceil_div(tokens, t.min_segment_tokens)), 1);
}

}  // namespace latte::cuda
