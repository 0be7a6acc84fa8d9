// SPDX-License-Identifier: Apache-2.0
// h[t] = a[t] h[t-1] + b[t], with a and b given or from the gates of RG-LRU: a thread per channel,
// the carry in a register. Backward, from the last token: g[t] = dh[t] + c[t], c[t-1] = a[t] g[t],
// a recurrence of the same form. db = g, da = g h[t-1].
//
// Where there are too few channels and sequences to fill the device, sequences are cut: a first
// launch finds what each segment does to the carry that enters it (it leaves as product * carry +
// end), the second folds the summaries of the segments before its own, then scans.
//
// Elements moved per token and channel (read + written); cut, with the summaries' second reads:
//   linear forward   2 + 1, cut 4 + 1      linear backward   3 + 2, cut 5 + 2
//   RG-LRU forward   3 + 1, cut 6 + 1      RG-LRU backward   5 + 3, cut 7 + 3
// Summaries are two numbers per segment of 256 or more tokens, written once and read from the
// second-level cache.
#pragma once

#include "cuda/rows.cuh"

namespace latte::cuda {

struct RecurrenceParams {
  // Linear: a, b, h. Gated: b is x, h is y.
  Rows a, b, h, gate_a, gate_x, dh, da, db, d_gate_a, d_gate_x;
  Rows log_lambda, d_log_lambda;
  // Forward: h before the first token, and the last h. Backward: the former, then what enters at
  // the last token and leaves at the first.
  Rows initial, final, d_final, d_initial;
  const bool *mask = nullptr, *fresh = nullptr;
  int64_t mask_stride_b = 0, mask_stride_t = 0, fresh_stride = 0;
  Sequences sequences;
  int64_t channels = 0, segment = 1, segments = 1;
  bool turned = false;             // scans from the last token to the first
  int64_t* first_token = nullptr;  // (N,), where a mask may hide it and it matters: find_first()
  void* summaries = nullptr;       // (N, segments, 2, C) compute type
  void* partial = nullptr;         // (N, segments, C) compute type, sums for d_log_lambda
};

// What a token does to the carry.
template <class T>
struct Affine {
  T a, b;
};

// A thread's part of the work.
struct Place {
  int64_t sequence, segment, channel;
  Range range;
  int64_t begin, end;  // tokens in the order of the scan
  bool is_last;

  __device__ __forceinline__ explicit Place(const RecurrenceParams& p) {
    const int64_t blocks = ceil_div(p.channels, blockDim.x), index = blockIdx.x;
    channel = index % blocks * blockDim.x + threadIdx.x;
    segment = index / blocks % p.segments;
    sequence = index / blocks / p.segments;
    range = p.sequences.range(sequence);
    begin = segment * p.segment;
    end = least(begin + p.segment, range.tokens);
    is_last = end == range.tokens && (begin < end || segment == 0);
  }
  // Row `row` of this segment, of `rows` each.
  __device__ __forceinline__ int64_t slot(const RecurrenceParams& p, int64_t rows = 1,
                                          int64_t row = 0) const {
    return ((sequence * p.segments + segment) * rows + row) * p.channels + channel;
  }
};

template <class T_>
class LinearForward {
 public:
  using T = T_;
  static constexpr bool kBackward = false, kSums = false;
  static constexpr int kBlocks = 4;  // per multiprocessor, in 128 registers a thread
  struct Tile {
    T a[kTile<T>], b[kTile<T>];
  };

  __device__ __forceinline__ LinearForward(const RecurrenceParams& p, const Place& at)
      : a_(p.a, at.range, at.channel, p.turned),
        b_(p.b, at.range, at.channel, p.turned),
        h_(p.h, at.range, at.channel, p.turned) {}

  template <bool kSummary>
  __device__ __forceinline__ void read(int64_t t, int64_t count, Tile& tile) const {
    a_.load(t, count, tile.a), b_.load(t, count, tile.b);
  }
  __device__ __forceinline__ Affine<T> map(int64_t, const Tile& tile, int i) const {
    return {tile.a[i], tile.b[i]};
  }
  __device__ __forceinline__ T scan(int64_t, Tile& tile, int i, T carry) {
    return tile.b[i] = tile.a[i] * carry + tile.b[i];
  }
  __device__ __forceinline__ void write(int64_t t, int64_t count, const Tile& tile) const {
    h_.store(t, count, tile.b);
  }

 private:
  Column<T> a_, b_, h_;
};

template <class T_>
class LinearBackward {
 public:
  using T = T_;
  static constexpr bool kBackward = true, kSums = false;
  static constexpr int kBlocks = 4;
  struct Tile {
    T a[kTile<T>], dh[kTile<T>], h[kTile<T>];
  };

  __device__ __forceinline__ LinearBackward(const RecurrenceParams& p, const Place& at)
      : a_(p.a, at.range, at.channel, p.turned),
        h_(p.h, at.range, at.channel, p.turned),
        dh_(p.dh, at.range, at.channel, p.turned),
        da_(p.da, at.range, at.channel, p.turned),
        db_(p.db, at.range, at.channel, p.turned),
        tokens_(at.range.tokens),
        before_(cuda::read<T>(p.initial, at.sequence, 0, at.channel)) {}

  template <bool kSummary>
  __device__ __forceinline__ void read(int64_t t, int64_t count, Tile& tile) const {
    a_.load(t, count, tile.a), dh_.load(t, count, tile.dh);
    if constexpr (!kSummary) h_.load(t + 1, least(count, tokens_ - t - 1), tile.h);
  }
  __device__ __forceinline__ Affine<T> map(int64_t, const Tile& tile, int i) const {
    return {tile.a[i], tile.a[i] * tile.dh[i]};
  }
  __device__ __forceinline__ T scan(int64_t t, Tile& tile, int i, T carry) {
    const T g = tile.dh[i] + carry, a = tile.a[i];
    tile.dh[i] = g;
    tile.a[i] = g * (t + 1 == tokens_ ? before_ : tile.h[i]);
    return a * g;
  }
  __device__ __forceinline__ void write(int64_t t, int64_t count, const Tile& tile) const {
    da_.store(t, count, tile.a), db_.store(t, count, tile.dh);
  }

 private:
  Column<T> a_, h_, dh_, da_, db_;
  int64_t tokens_;
  T before_;
};

// The carry that enters a segment.
template <class T>
__device__ __forceinline__ T enter(const RecurrenceParams& p, const Rows& from, const Place& at) {
  T carry = read<T>(from, at.sequence, 0, at.channel);
  if (at.segment == 0 || at.begin >= at.end) return carry;
  const T* summary =
      static_cast<const T*>(p.summaries) + (at.sequence * p.segments * 2 * p.channels + at.channel);
#pragma unroll 4
  for (int64_t s = 0; s < at.segment; ++s, summary += 2 * p.channels)
    carry = summary[0] * carry + summary[p.channels];
  return carry;
}

// kSummary: writes what the segment does to the carry; of the last one nobody asks.
template <class Op, bool kSummary>
__global__ void __launch_bounds__(kChannelThreads, Op::kBlocks) recurrence(RecurrenceParams p) {
  using T = typename Op::T;
  const Place at(p);
  if (at.channel >= p.channels || (kSummary && (at.is_last || at.begin >= at.end))) return;
  T product = 1, carry = 0;
  if constexpr (!kSummary) carry = enter<T>(p, Op::kBackward ? p.d_final : p.initial, at);
  Op op(p, at);
  typename Op::Tile next;
  op.template read<kSummary>(at.begin, at.end - at.begin, next);
#pragma unroll 1
  for (int64_t t = at.begin; t < at.end; t += kTile<T>) {
    // The loads of the next tile are on their way while this one is computed.
    typename Op::Tile tile = next;
    op.template read<kSummary>(t + kTile<T>, at.end - t - kTile<T>, next);
#pragma unroll
    for (int i = 0; i < kTile<T>; ++i) {
      if (t + i >= at.end) continue;
      if constexpr (kSummary) {
        const Affine<T> map = op.map(t + i, tile, i);
        product *= map.a;
        carry = map.a * carry + map.b;
      } else {
        carry = op.scan(t + i, tile, i, carry);
      }
    }
    if constexpr (!kSummary) op.write(t, at.end - t, tile);
  }
  if constexpr (kSummary) {
    T* const summaries = static_cast<T*>(p.summaries);
    summaries[at.slot(p, 2, 0)] = product;
    summaries[at.slot(p, 2, 1)] = carry;
  } else {
    if (at.is_last) write(Op::kBackward ? p.d_initial : p.final, at.sequence, 0, at.channel, carry);
    if constexpr (Op::kSums) static_cast<T*>(p.partial)[at.slot(p)] = op.sum();
  }
}

}  // namespace latte::cuda
