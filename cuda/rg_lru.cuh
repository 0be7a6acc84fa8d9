// SPDX-License-Identifier: Apache-2.0
// The gates of RG-LRU in front of a recurrence (cuda/recurrence.cuh has the scans and the bytes):
//   r = sigmoid(gate_a)   i = sigmoid(gate_x)   log a = -8 r softplus(log_lambda)
//   b = sqrt(1 - a^2) i x, the square root 1 at the first token of a sequence
#pragma once

#include <cmath>

#include "cuda/recurrence.cuh"

namespace latte::cuda {

template <class T>
inline constexpr T kPower = 8;
// Half of 1 / 1000: the derivative of a square root s is 1 / (2 s), bounded by 1000.
template <class T>
inline constexpr T kSteepest = T(5e-4);

// `rest` becomes 1 - sigmoid(x), to full accuracy on either side.
template <class T>
__device__ __forceinline__ T sigmoid(T x, T& rest) {
  using std::exp, std::abs;
  const T e = exp(-abs(x)), large = 1 / (1 + e), small = e * large;
  rest = x < 0 ? large : small;
  return x < 0 ? small : large;
}

// -log a = decay r.
template <class T>
__device__ __forceinline__ T decay_of(T log_lambda) {
  using std::exp, std::log1p, std::abs;
  const T tail = log1p(exp(-abs(log_lambda)));
  return kPower<T> * (log_lambda > 0 ? log_lambda + tail : tail);
}

// r, 1 - r, a and 1 - a.
template <class T>
struct DecayGate {
  __device__ __forceinline__ DecayGate(T gate, T decay) : r(sigmoid(gate, rest)) {
    using std::expm1;
    lost = -expm1(-r * decay);
    a = 1 - lost;
  }
  T rest, r, lost, a;
};

template <class T>
struct Gates : DecayGate<T> {
  __device__ __forceinline__ Gates(T gate_a, T gate_x, T decay)
      : DecayGate<T>(gate_a, decay), i(sigmoid(gate_x, i_rest)) {
    using std::sqrt;
    // (1 - a) (1 + a), where 1 - a^2 would lose all digits of a slow decay.
    root = sqrt(this->lost * (1 + this->a));
  }
  T i_rest, i, root;
};

// Which tokens of a sequence are there, in the order of the scan.
template <class T>
class Presence {
 public:
  __device__ __forceinline__ Presence(const RecurrenceParams& p, const Place& at) {
    if (!p.mask) return;
    const int64_t start = at.range.first + (p.turned ? at.range.tokens - 1 : 0);
    mask_ = p.mask + at.range.batch * p.mask_stride_b + start * p.mask_stride_t;
    step_ = p.turned ? -p.mask_stride_t : p.mask_stride_t;
  }
  // Bit i: token t + i is there.
  __device__ __forceinline__ unsigned load(int64_t t, int64_t count) const {
    if (!mask_) return ~0u;
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < kTile<T>; ++i)
      if (i < count && mask_[(t + i) * step_]) bits |= 1u << i;
    return bits;
  }

 private:
  const bool* mask_ = nullptr;
  int64_t step_ = 0;
};

// The token whose square root is 1, in the order of the scan; -1: none.
__device__ __forceinline__ int64_t first_token(const RecurrenceParams& p, const Place& at,
                                               bool backward) {
  if (p.initial.data && !(p.fresh && p.fresh[at.sequence * p.fresh_stride])) return -1;
  const int64_t first = p.first_token ? p.first_token[at.sequence] : 0;
  if (first >= at.range.tokens) return -1;
  return backward ? at.range.tokens - 1 - first : first;
}

// first_token[n] = the first token of sequence n that the mask leaves, in the order of a forward
// scan, or the number of tokens. Each thread looks at every kChannelThreads-th; a block per
// sequence.
static __global__ void __launch_bounds__(kChannelThreads)
    find_first(RecurrenceParams p, bool reverse) {
  auto* const found = reinterpret_cast<int64_t*>(shared_memory());
  const Range range = p.sequences.range(blockIdx.x);
  const bool* const mask = p.mask + range.batch * p.mask_stride_b;
  int64_t t = threadIdx.x;
  for (; t < range.tokens; t += kChannelThreads) {
    const int64_t token = range.first + (reverse ? range.tokens - 1 - t : t);
    if (mask[token * p.mask_stride_t]) break;
  }
  found[threadIdx.x] = least(t, range.tokens);
  for (unsigned half = kChannelThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half)
      found[threadIdx.x] = least(found[threadIdx.x], found[threadIdx.x + half]);
  }
  if (threadIdx.x == 0) p.first_token[blockIdx.x] = found[0];
}
inline constexpr int64_t kFindShared = int64_t{kChannelThreads} * sizeof(int64_t);

template <class T_>
class GatedForward {
 public:
  using T = T_;
  static constexpr bool kBackward = false, kSums = false;
  static constexpr int kBlocks = 4;
  struct Tile {
    T x[kTile<T>], gate_a[kTile<T>], gate_x[kTile<T>];
    unsigned present;
  };

  __device__ __forceinline__ GatedForward(const RecurrenceParams& p, const Place& at)
      : x_(p.b, at.range, at.channel, p.turned),
        gate_a_(p.gate_a, at.range, at.channel, p.turned),
        gate_x_(p.gate_x, at.range, at.channel, p.turned),
        y_(p.h, at.range, at.channel, p.turned),
        presence_(p, at),
        decay_(decay_of(cuda::read<T>(p.log_lambda, 0, 0, at.channel))),
        first_(first_token(p, at, false)) {}

  template <bool kSummary>
  __device__ __forceinline__ void read(int64_t t, int64_t count, Tile& tile) const {
    tile.present = presence_.load(t, count);
    x_.load(t, count, tile.x);
    gate_a_.load(t, count, tile.gate_a), gate_x_.load(t, count, tile.gate_x);
  }
  __device__ __forceinline__ Affine<T> map(int64_t t, const Tile& tile, int i) const {
    if (!(tile.present >> i & 1)) return {1, 0};
    const Gates<T> g(tile.gate_a[i], tile.gate_x[i], decay_);
    return {g.a, (t == first_ ? T(1) : g.root) * (g.i * tile.x[i])};
  }
  __device__ __forceinline__ T scan(int64_t t, Tile& tile, int i, T carry) {
    const Affine<T> token = map(t, tile, i);
    return tile.x[i] = token.a * carry + token.b;
  }
  __device__ __forceinline__ void write(int64_t t, int64_t count, const Tile& tile) const {
    y_.store(t, count, tile.x);
  }

 private:
  Column<T> x_, gate_a_, gate_x_, y_;
  Presence<T> presence_;
  T decay_;
  int64_t first_;
};

template <class T_>
class GatedBackward {
 public:
  using T = T_;
  static constexpr bool kBackward = true, kSums = true;
  static constexpr int kBlocks = 2;  // two tiles of five inputs
  struct Tile {
    T x[kTile<T>], gate_a[kTile<T>], gate_x[kTile<T>], dy[kTile<T>], y[kTile<T>];
    unsigned present;
  };

  __device__ __forceinline__ GatedBackward(const RecurrenceParams& p, const Place& at)
      : x_(p.b, at.range, at.channel, p.turned),
        gate_a_(p.gate_a, at.range, at.channel, p.turned),
        gate_x_(p.gate_x, at.range, at.channel, p.turned),
        y_(p.h, at.range, at.channel, p.turned),
        dy_(p.dh, at.range, at.channel, p.turned),
        dx_(p.db, at.range, at.channel, p.turned),
        d_gate_a_(p.d_gate_a, at.range, at.channel, p.turned),
        d_gate_x_(p.d_gate_x, at.range, at.channel, p.turned),
        presence_(p, at),
        decay_(decay_of(cuda::read<T>(p.log_lambda, 0, 0, at.channel))),
        before_(cuda::read<T>(p.initial, at.sequence, 0, at.channel)),
        first_(first_token(p, at, true)),
        tokens_(at.range.tokens) {}

  template <bool kSummary>
  __device__ __forceinline__ void read(int64_t t, int64_t count, Tile& tile) const {
    tile.present = presence_.load(t, count);
    gate_a_.load(t, count, tile.gate_a), dy_.load(t, count, tile.dy);
    if constexpr (kSummary) return;
    x_.load(t, count, tile.x), gate_x_.load(t, count, tile.gate_x);
    y_.load(t + 1, least(count, tokens_ - t - 1), tile.y);
  }
  __device__ __forceinline__ Affine<T> map(int64_t, const Tile& tile, int i) const {
    if (!(tile.present >> i & 1)) return {1, tile.dy[i]};
    const T a = DecayGate<T>(tile.gate_a[i], decay_).a;
    return {a, a * tile.dy[i]};
  }
  // Leaves dx, d_gate_a and d_gate_x where the inputs were.
  __device__ __forceinline__ T scan(int64_t t, Tile& tile, int i, T carry) {
    const T d = tile.dy[i] + carry;
    if (!(tile.present >> i & 1)) {
      tile.x[i] = tile.gate_a[i] = tile.gate_x[i] = 0;
      return d;
    }
    const Gates<T> g(tile.gate_a[i], tile.gate_x[i], decay_);
    const bool is_first = t == first_;
    const T through = d * g.a, gated = g.i * tile.x[i], d_input = is_first ? d : d * g.root;
    T d_log_a = through * (t + 1 == tokens_ ? before_ : tile.y[i]);
    if (!is_first)
      d_log_a -= through * (gated * g.a) / (g.root > kSteepest<T> ? g.root : kSteepest<T>);
    const T d_r = -d_log_a * g.r;
    tile_sum_ += d_r;
    tile.x[i] = d_input * g.i;
    tile.gate_x[i] = d_input * gated * g.i_rest;
    tile.gate_a[i] = d_r * decay_ * g.rest;
    return through;
  }
  __device__ __forceinline__ void write(int64_t t, int64_t count, const Tile& tile) {
    dx_.store(t, count, tile.x);
    d_gate_a_.store(t, count, tile.gate_a), d_gate_x_.store(t, count, tile.gate_x);
    total_ += static_cast<double>(tile_sum_);
    tile_sum_ = 0;
  }
  // Of the gradient of kPower softplus(log_lambda).
  __device__ __forceinline__ T sum() const { return static_cast<T>(total_); }

 private:
  Column<T> x_, gate_a_, gate_x_, y_, dy_, dx_, d_gate_a_, d_gate_x_;
  Presence<T> presence_;
  T decay_, before_, tile_sum_ = 0;
  double total_ = 0;  // over a whole sequence; float would lose digits
  int64_t first_, tokens_;
};

// d_log_lambda from the sum over all tokens.
template <class T>
struct WriteLambdaGradient {
  RecurrenceParams p;

  __device__ __forceinline__ void operator()(int64_t c, double sum) const {
    using std::exp;
    const T slope = kPower<T> / (1 + exp(-read<T>(p.log_lambda, 0, 0, c)));
    write(p.d_log_lambda, 0, 0, c, static_cast<T>(sum * static_cast<double>(slope)));
  }
};

}  // namespace latte::cuda
