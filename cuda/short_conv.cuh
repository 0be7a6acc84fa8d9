// SPDX-License-Identifier: Apache-2.0
// y[t] = bias + sum over j < K of w[j] x[t - left + j], per channel: a thread per channel walks a
// run of tokens with the K rows of its window in registers.
//
// Backward, in one pass over x and dy: dx[t] = sum over j of w[j] dy[t + left - j],
// dw[j] = sum over t of dy[t] x[t - left + j], dbias = sum over t of dy[t]. The sums of a run go to
// the workspace and are added in one order: no atomics.
//
// Elements moved per token and channel (read + written), with runs of R = 32 to 256 tokens:
//   forward   1 + (K - 1) / R  + 1
//   backward  2 + 2 (K - 1) / R + 1, and (K + 1) / R sums of the compute type, written and read
#pragma once

#include "cuda/rows.cuh"

namespace latte::cuda {

inline constexpr int kMaxWidth = 8;

struct ConvParams {
  Rows x, y, dy, dx;
  Rows weight, bias;                        // K rows and one
  Rows initial, final, d_final, d_initial;  // K - 1 rows per sequence
  Rows d_weight, d_bias;
  Sequences sequences;
  int64_t tokens = 0, channels = 0, width = 1, left = 0;
  int64_t run = 1, runs = 0;  // tokens of a run, runs of a batch
  void* partial = nullptr;    // (batch runs, K + 1, C) compute type
};

// Part of a run within one sequence: tokens [begin, end) of that sequence.
struct Piece {
  int64_t sequence, channel;
  Range range;
  int64_t begin, end;
};

// Calls f(piece) for what a thread's run holds of each sequence, in order.
template <class F>
__device__ __forceinline__ void for_each_piece(const ConvParams& p, int64_t run, int64_t channel,
                                               F f) {
  const int64_t batch = run / p.runs;
  int64_t t = run % p.runs * p.run;
  const int64_t end = least(t + p.run, p.tokens);
  Piece piece;
  piece.channel = channel;
  for (piece.sequence = p.sequences.find(batch, t);
       t < end && piece.sequence < p.sequences.end(batch); ++piece.sequence) {
    piece.range = p.sequences.range(piece.sequence);
    piece.begin = t - piece.range.first;
    piece.end = least(end - piece.range.first, piece.range.tokens);
    if (piece.begin < 0 || piece.begin >= piece.end) continue;
    f(piece);
    t = piece.range.first + piece.end;
  }
}

// kTile rows and the K - 1 before them: row i is token `first` + i of a sequence.
template <class T, int K>
struct Window {
  static constexpr int kRows = kTile<T> + K - 1;
  T rows[kRows];

  // The K - 1 rows; `before` has those of tokens t < 0 in its row t + K - 1.
  __device__ __forceinline__ void start(const Column<T>& column, const Column<T>& before,
                                        const Range& range, int64_t first) {
    if constexpr (K > 1) {
      T inside[K - 1], outside[K - 1];
      column.load(first, range.tokens - first, inside, -first);
      before.load(first + K - 1, -first, outside, -(first + K - 1));
#pragma unroll
      for (int i = 0; i < K - 1; ++i) rows[i] = first + i < 0 ? outside[i] : inside[i];
    }
  }
  __device__ __forceinline__ void load(const Column<T>& column, const Range& range, int64_t first) {
    T tile[kTile<T>];
    column.load(first + K - 1, range.tokens - (first + K - 1), tile);
#pragma unroll
    for (int i = 0; i < kTile<T>; ++i) rows[K - 1 + i] = tile[i];
  }
  __device__ __forceinline__ void shift() {
#pragma unroll
    for (int i = 0; i < K - 1; ++i) rows[i] = rows[kTile<T> + i];
  }
};

// The rows of a state (N,K-1,C) as a column.
template <class T>
__device__ __forceinline__ Column<T> state_column(const Rows& rows, const Piece& at) {
  return Column<T>(rows, Range{at.sequence, 0, 0}, at.channel);
}

template <class T, int K>
__device__ __forceinline__ void read_weights(const ConvParams& p, int64_t channel, T (&weight)[K]) {
#pragma unroll
  for (int j = 0; j < K; ++j) weight[j] = read<T>(p.weight, 0, j, channel);
}

template <class T, int K>
__global__ void __launch_bounds__(kChannelThreads, 3) conv_forward(ConvParams p) {
  const int64_t blocks = ceil_div(p.channels, blockDim.x);
  const int64_t channel = blockIdx.x % blocks * blockDim.x + threadIdx.x;
  if (channel >= p.channels) return;
  T weight[K];
  read_weights(p, channel, weight);
  const T bias = read<T>(p.bias, 0, 0, channel);
  for_each_piece(p, blockIdx.x / blocks, channel, [&](const Piece& at) {
    const Column<T> x(p.x, at.range, channel), y(p.y, at.range, channel);
    Window<T, K> window;
    window.start(x, state_column<T>(p.initial, at), at.range, at.begin - p.left);
#pragma unroll 1
    for (int64_t t = at.begin; t < at.end; t += kTile<T>) {
      window.load(x, at.range, t - p.left);
      T out[kTile<T>];
#pragma unroll
      for (int i = 0; i < kTile<T>; ++i) {
        out[i] = bias;
#pragma unroll
        for (int j = 0; j < K; ++j) out[i] += weight[j] * window.rows[i + j];
      }
      y.store(t, at.end - t, out);
      window.shift();
    }
  });
}

template <class T, int K, bool kCausal>
__global__ void __launch_bounds__(kChannelThreads, 3) conv_backward(ConvParams p) {
  constexpr int kLeft = kCausal ? K - 1 : (K - 1) / 2, kRight = K - 1 - kLeft;
  const int64_t blocks = ceil_div(p.channels, blockDim.x), run = blockIdx.x / blocks;
  const int64_t channel = blockIdx.x % blocks * blockDim.x + threadIdx.x;
  if (channel >= p.channels) return;
  T weight[K], sums[K + 1] = {};
  read_weights(p, channel, weight);
  for_each_piece(p, run, channel, [&](const Piece& at) {
    const Column<T> x(p.x, at.range, channel), dy(p.dy, at.range, channel),
        dx(p.dx, at.range, channel), none(Rows{}, at.range, channel),
        d_final = state_column<T>(p.d_final, at);
    // Token t of the last K - 1 is row t - state of the final state.
    const int64_t state = at.range.tokens - (K - 1);
    Window<T, K> inputs, gradients;
    inputs.start(x, state_column<T>(p.initial, at), at.range, at.begin - kLeft);
    gradients.start(dy, none, at.range, at.begin - kRight);
#pragma unroll 1
    for (int64_t t = at.begin; t < at.end; t += kTile<T>) {
      inputs.load(x, at.range, t - kLeft);
      gradients.load(dy, at.range, t - kRight);
      T out[kTile<T>];
      d_final.load(t - state, at.end - t, out, state - t);
#pragma unroll
      for (int i = 0; i < kTile<T>; ++i) {
        // The next run of the same sequence sums its own.
        const T own = t + i < at.end ? gradients.rows[i + kRight] : T(0);
#pragma unroll
        for (int j = 0; j < K; ++j) {
          out[i] += weight[j] * gradients.rows[i + K - 1 - j];
          sums[j] += own * inputs.rows[i + j];
        }
        sums[K] += own;
      }
      dx.store(t, at.end - t, out);
      inputs.shift(), gradients.shift();
    }
  });
  T* const partial = static_cast<T*>(p.partial) + run * (K + 1) * p.channels + channel;
#pragma unroll
  for (int j = 0; j <= K; ++j) partial[j * p.channels] = sums[j];
}

// A thread per sequence and channel, for the K - 1 rows of its state.
__device__ __forceinline__ bool state_place(const ConvParams& p, Piece& at) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  at.sequence = index / p.channels;
  at.channel = index % p.channels;
  if (at.sequence >= p.sequences.count()) return false;
  at.range = p.sequences.range(at.sequence);
  return true;
}

// Row `row` of a state, or zero before its first.
template <class T>
__device__ __forceinline__ T state_row(const Rows& rows, const Piece& at, int64_t row) {
  return row >= 0 ? read<T>(rows, at.sequence, row, at.channel) : T(0);
}

// The last K - 1 of (initial, x). In order, since `final` may be `initial` itself.
template <class T>
__global__ void __launch_bounds__(kChannelThreads) conv_final(ConvParams p) {
  Piece at;
  if (!state_place(p, at)) return;
  for (int64_t i = 0; i < p.width - 1; ++i) {
    const int64_t t = at.range.tokens - (p.width - 1) + i;
    write(p.final, at.sequence, i, at.channel,
          t < 0 ? state_row<T>(p.initial, at, t + p.width - 1)
                : read<T>(p.x, at.range.batch, at.range.first + t, at.channel));
  }
}

// The gradients of the inputs before the first token, as those of any other.
template <class T>
__global__ void __launch_bounds__(kChannelThreads) conv_d_initial(ConvParams p) {
  Piece at;
  if (!state_place(p, at)) return;
  for (int64_t i = 0; i < p.width - 1; ++i) {
    const int64_t t = i - (p.width - 1);
    T sum = state_row<T>(p.d_final, at, i - at.range.tokens);
    for (int64_t j = 0; j < p.width; ++j) {
      const int64_t from = t + p.left - j;
      if (from >= 0 && from < at.range.tokens)
        sum += read<T>(p.weight, 0, j, at.channel) *
               read<T>(p.dy, at.range.batch, at.range.first + from, at.channel);
    }
    write(p.d_initial, at.sequence, i, at.channel, sum);
  }
}

// d_weight and d_bias from the sums of all runs, column j C + c of K + 1 rows.
template <class T>
struct WriteConvGradient {
  ConvParams p;

  __device__ __forceinline__ void operator()(int64_t column, double sum) const {
    const int64_t j = column / p.channels, c = column % p.channels;
    if (j < p.width) {
      write(p.d_weight, 0, j, c, static_cast<T>(sum));
    } else {
      write(p.d_bias, 0, 0, c, static_cast<T>(sum));
    }
  }
};

}  // namespace latte::cuda
