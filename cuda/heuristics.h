// SPDX-License-Identifier: Apache-2.0
// Sizes that are chosen, not derived: pure functions of the shape. Not of the device: the order of
// every sum, and so every bit of a result, is then the same on all of them.
#pragma once

#include <cstdint>

namespace latte::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Threads that keep the memory of an H100 busy: 132 multiprocessors need 16 KiB on their way each
// (3 TB/s at 0.7 us), about 512 threads with 32 bytes.
inline constexpr int64_t kWantedThreads = int64_t{1} << 16;

// Recurrences and convolutions: a thread per channel, neighbours in a row.
inline constexpr int kChannelThreads = 128;
constexpr int channel_threads(int64_t channels) {
  return static_cast<int>(least(kChannelThreads, round_up(channels, 32)));
}
// Tokens that a thread loads before it computes with the first of them: as many as registers hold.
template <class T>
inline constexpr int kTile = sizeof(T) == 8 ? 4 : 8;
inline constexpr int64_t kLargestTile = kTile<float>;

// Tokens per segment of a scan. A cut costs a second pass over some inputs, 1.25 to 1.75 times the
// bytes in all, so there is none unless twice the columns (sequences times channels) would still
// not fill the device. A segment folds the summaries of all before it: at most 64.
inline constexpr int64_t kMinSegment = 256, kMaxSegments = 64;
constexpr int64_t scan_segment(int64_t columns, int64_t tokens) {
  if (columns < 1) return most(tokens, 1);
  const int64_t count = least(least(kWantedThreads / columns, tokens / kMinSegment), kMaxSegments);
  return count < 2 ? most(tokens, 1) : round_up(ceil_div(tokens, count), kLargestTile);
}

// Tokens of a convolution that one thread walks: K - 1 rows around them are read twice.
inline constexpr int64_t kMinConvTokens = 32, kMaxConvTokens = 256;
constexpr int64_t conv_tokens(int64_t tokens, int64_t channels) {
  const int64_t share = round_up(ceil_div(tokens * channels, 2 * kWantedThreads), kLargestTile);
  return least(most(share, kMinConvTokens), kMaxConvTokens);
}

// Sums over rows of partial sums: threads across columns, and rows side by side.
inline constexpr int kSumColumns = 32, kSumRows = 16;

// A merge of states: a warp per latent.
inline constexpr int kMergeThreads = 128;

// A decoding step: threads of a block, channels of the slice that they walk together (one line of
// 128 bytes of float32), query heads that share a visit of the state, latents per thread whose
// loads are on their way together.
inline constexpr int kStepThreads = 256, kStepChannels = 32, kStepHeads = 4, kStepLatents = 4;
// Latents whose weights fit in 48 KiB of shared memory beside the sums, in float64 too.
inline constexpr int64_t kMaxStepLatents = 512;
// Elements of a state (64 KiB of float32) below which a block is not worth a second launch.
inline constexpr int64_t kMinStepSlice = int64_t{1} << 14;
// Slices of D on different blocks: as few as fill the device.
constexpr int64_t step_slices(int64_t heads, int64_t latents, int64_t dim) {
  const int64_t wanted = kWantedThreads / kStepThreads / most(heads, 1);
  const int64_t finest = least(ceil_div(dim, kStepChannels), latents * dim / kMinStepSlice);
  return most(least(wanted, finest), 1);
}

// Rotations: tokens and pairs whose cosines and sines lie in shared memory (34 KiB in float64), and
// pairs between those of two tokens.
inline constexpr int kRotateTokens = 16, kRotatePairs = 128, kRotatePadding = 8;
inline constexpr int kRotateThreads = 256;
// Groups of heads on different blocks: as few as fill the device.
constexpr int64_t rotate_groups(int64_t blocks, int64_t heads) {
  const int64_t wanted = ceil_div(kWantedThreads / kRotateThreads, most(blocks, 1));
  return most(least(wanted, heads), 1);
}

}  // namespace latte::cuda
