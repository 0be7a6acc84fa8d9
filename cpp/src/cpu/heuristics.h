// SPDX-License-Identifier: Apache-2.0
// Sizes that are chosen, not derived: pure functions of the shape and the number of threads, so
// that a result never depends on timing or load.
#pragma once

#include <cstdint>

namespace latte::cpu {

// Tokens per chunk. 32 to 128 run within 3 % of each other; 64 keeps the operands of L = D = 128
// in a quarter of a 1 MiB second-level cache.
inline constexpr int64_t kChunk = 64;

// Rows of the caller's tensor that lie further apart (bytes) are copied before a scan reads them.
// A column of 64 rows 512 bytes apart takes 8 ways of an L1 set, and X or G come once per column
// block; as Y, read once per row block, 64 rows at a page each still stay in the second-level
// cache.
inline constexpr int64_t kMaxRowStride = 512, kMaxColumnStride = 4096;

// Threads worth waking for work of `flops`. Waking a team costs about as much as one core computes
// in 100 kflop.
constexpr int useful_threads(double flops, int threads) {
  const double worth = flops / 1e5;
  const int n = worth < static_cast<double>(threads) ? static_cast<int>(worth) : threads;
  return n < 1 ? 1 : n;
}

// A part shorter than this loses more to its summary and to the barriers than it gains.
inline constexpr int64_t kMinPart = 1024;

// Threads that one sequence of `tokens`, out of `total` over all sequences and heads, is cut for:
// its share of them, so that a sequence is cut only where it would keep other threads waiting. With
// B H >= threads equal sequences never are.
constexpr int64_t parts(int64_t tokens, int64_t total, int threads) {
  if (total <= 0) return 1;
  const int64_t share = tokens * threads / total, longest = tokens / kMinPart;
  const int64_t n = share < longest ? share : longest;
  return n < 2 ? 1 : n;
}

// Cut i of a sequence of `tokens`, at a multiple of kChunk.
constexpr int64_t cut_at(int64_t tokens, int64_t numerator, int64_t denominator) {
  if (numerator >= denominator) return tokens;
  return tokens * numerator / denominator / kChunk * kChunk;
}
// Segment i of n + 1 begins here. A causal scan (4 L D per token) needs the state before it, and
// the summary of a segment's keys costs half a scan: the first segment is scanned while the next n
// - 1 are summarised, then the other n are scanned. Weights 1, 2, 2, ..: the speed-up is (2 n + 1)
// / 3, where equal segments give 2 n / 3.
constexpr int64_t forward_cut(int64_t i, int64_t n, int64_t tokens) {
  return i == 0 ? 0 : cut_at(tokens, 2 * i - 1, 2 * n + 1);
}
// The same for pass R of the gradient (8 L D, its summary 2 L D), which runs from the end: weights
// 4, .., 4, 1.
constexpr int64_t reverse_cut(int64_t i, int64_t n, int64_t tokens) {
  return cut_at(tokens, i > n ? 4 * n + 1 : 4 * i, 4 * n + 1);
}
// Bidirectional segments are equal: n of them.
constexpr int64_t even_cut(int64_t i, int64_t n, int64_t tokens) { return cut_at(tokens, i, n); }

// Heads whose rows lie side by side in memory, as (B,T,H,.) stores them, are walked together, chunk
// by chunk, so that each page is visited once for all of them. All of the heads of a row, up to so
// many, are one stream of memory: 1.2 times as fast as two of them, which are 1.08 times as fast as
// one (8 heads of 8,192 tokens). Four of eight gain no more than two.
inline constexpr int64_t kHeadsTogether = 8;
// All or two, unless a thread then had more heads to walk.
constexpr int64_t heads_together(int64_t sequences, int64_t heads, int threads) {
  for (const int64_t n : {heads, int64_t{2}}) {
    if (n < 2 || n > kHeadsTogether) continue;
    const int64_t groups = sequences * ((heads + n - 1) / n);
    const int64_t turns = (groups + threads - 1) / threads * n;
    if (turns <= (sequences * heads + threads - 1) / threads) return n;
  }
  return 1;
}

// Consecutive heads that a thread steps: their states lie one behind the other, and a stream that
// jumps at every head of 16 KiB keeps the prefetchers from running ahead. At most a sixteenth of a
// thread's share, for balance.
constexpr int64_t step_grain(int64_t heads, int threads) {
  const int64_t share = heads / (16 * threads);
  return share < 1 ? 1 : share < 64 ? share : 64;
}
// Recurrences and convolutions move memory: rows of a block of channels, as long as its carries and
// tiles stay in the first- and second-level cache. Long rows keep the prefetchers in step.
inline constexpr int64_t kBlockChannels = 512;
// A block narrower than this wastes most of a prefetched page.
inline constexpr int64_t kMinBlockChannels = 64;
// Bytes per row's width by which a scan is ahead of itself with prefetches.
inline constexpr int64_t kFetchBytes = 4096;
// Rows that are converted to the compute type at once, where they cannot be used in place.
inline constexpr int64_t kTileRows = 4;

// Blocks of channels: few and wide, but enough for `threads` if `rows_of_blocks` of them exist.
constexpr int64_t channel_blocks(int64_t channels, int64_t rows_of_blocks, int threads) {
  const int64_t fewest = (channels + kBlockChannels - 1) / kBlockChannels;
  if (rows_of_blocks < 1) return fewest;
  const int64_t wanted = (threads + rows_of_blocks - 1) / rows_of_blocks;
  const int64_t most = channels / kMinBlockChannels;
  const int64_t more = wanted < most ? wanted : most;
  return more > fewest ? more : fewest;
}

// A convolution has no carry: a sequence is cut into up to this many tasks over all of them, a
// number that does not depend on the threads, so that neither do the sums for the gradient of the
// weights.
inline constexpr int64_t kConvTasks = 64, kConvMinTokens = 256;
constexpr int64_t conv_segments(int64_t tokens, int64_t groups) {
  const int64_t most = groups < kConvTasks ? kConvTasks / (groups < 1 ? 1 : groups) : 1;
  const int64_t wanted = tokens / kConvMinTokens;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

// Rotations: tokens whose cosines and sines are in the caches together. 32 to 256 run within 10 %
// of each other; 128 of 64 channels take 32 KiB.
inline constexpr int64_t kRotateTokens = 128;

// Outputs of this many bytes go past the caches.
inline constexpr int64_t kStreamBytes = int64_t{1} << 25;

// Window attention. Queries per block: a band of `window` keys per query needs window + this many
// per block. Keys per step of the online softmax: their logits, keys and values fill a first-level
// cache.
inline constexpr int64_t kWindowQueries = 64;
inline constexpr int64_t kWindowKeys = 64;

// Queries of one sequence over which the gradients of sinks are summed before those sums are added:
// up to 64 of them, whatever the threads, and 512 or more, beside which a sum costs nothing.
constexpr int64_t sink_piece(int64_t tokens) {
  const int64_t least = 512, share = tokens / 64;
  const int64_t length = share < least ? least : share;
  return (length + kWindowQueries - 1) / kWindowQueries * kWindowQueries;
}

// Queries of a task, out of `total` over all sequences and heads: 4 tasks per thread, but no cut
// finer than 4 windows, since a task meets one window of its neighbour's keys again.
constexpr int64_t window_segment(int64_t total, int64_t window, int threads) {
  if (threads < 2) return total < 1 ? 1 : total;
  const int64_t share = total / (4 * threads), least = 4 * window < 512 ? 512 : 4 * window;
  const int64_t length = share < least ? least : share;
  return (length + kWindowKeys - 1) / kWindowKeys * kWindowKeys;
}

}  // namespace latte::cpu
