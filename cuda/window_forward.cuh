// SPDX-License-Identifier: Apache-2.0
// Attention of 64 queries to the keys of their windows, and to sinks: for the query at key position
// p
//   y = sum_s w_s v_s / sum_s w_s    w_s = exp(scale q . k_s - m)    p - window < s <= p
// (or |p - s| < window), with the online softmax over tiles of keys. Logits and weights never leave
// registers. Elements read per query, with a band of w keys per query, out of the L2 cache:
// (w + 63) / 64 (Dk + D); of global memory each once.
#pragma once

#include "cuda/window.cuh"

namespace latte::cuda {

template <class Shape>
class WindowForwardBlock {
 public:
  using E = typename Shape::Element;
  // Weights are at most 1 and fit in any type.
  using Product = typename Shape::Scores;
  static constexpr int C = Shape::C, kStride = Shape::kStride, kStreamed = Shape::kStreamed;
  static constexpr int kTiles = kStreamed / 16;

  __device__ __forceinline__ WindowForwardBlock(const WindowArgs& a, const WindowTile& w)
      : a_(a), w_(w), row_(warp_id() * 16) {}

  // Sinks come first: they find no sums to rescale.
  __device__ __forceinline__ void run() {
    if (a_.sinks > 0) walk(a_.q_sink, all_sinks<Shape>(a_, w_));
    walk(a_.q, window_keys<Shape>(a_, w_));
    finish();
  }

 private:
  template <bool kSinks>
  __device__ __forceinline__ void walk(const HeadRows& q, const KeyStream<Shape, kSinks>& keys) {
    if (keys.tiles() < 1) return;
    load_rows<E, C, kOwnRows>(m_.own(),
                              rows_from(q, w_.batch, w_.head, w_.first + w_.begin, a_.key_dim), 0,
                              [&](int row) { return w_.begin + row < w_.tokens; });
    keys.load(0);
    walk_chunks(
        keys.tiles(), a_.stages, [&](int64_t tile) { keys.load(tile); },
        [&](int64_t tile) {
          attend<kSinks>(m_.stage(stage_of(tile, a_.stages)), keys.key(tile), keys.band(tile));
          __syncthreads();
        });
  }

  template <bool kSinks>
  __device__ __forceinline__ void attend(const WindowStage<Shape>& s, int64_t key,
                                         const Band& band) {
    const Clip seen = kSinks ? Clip{0, band.columns} : band.of_rows(row_, row_ + 15);
    if (seen.begin >= seen.end) return;
    Tile logits[kTiles];
    multiply_keys(s, seen, logits);
    const bool masked = kSinks || a_.key_mask || !band.is_whole(row_, kStreamed);
    const Clip of_row[2] = {band.of_rows(row_ + tile_row(0), row_ + tile_row(0)),
                            band.of_rows(row_ + tile_row(2), row_ + tile_row(2))};
    float high[2] = {top_[0], top_[1]};
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      if (seen.meets(16 * j))
        for_each_of_rows(logits[j], [&](int half, int row, int column, float& x) {
          x = capped(a_, a_.scale * x);
          if (masked) {
            const bool visible =
                kSinks ? sees_sink(a_, w_, w_.begin + row_ + row, key + 16 * j + column)
                       : of_row[half].holds(16 * j + column) &&
                             (!a_.key_mask || s.row(16 * j + column).used);
            if (!visible) x = -kInfinity;
          }
          high[half] = fmaxf(high[half], x);
        });
    rescale(high);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      if (seen.meets(16 * j)) add_values(s, j, logits[j]);
  }

  __device__ __forceinline__ void multiply_keys(const WindowStage<Shape>& s, const Clip& seen,
                                                Tile (&logits)[kTiles]) const {
    const E* const q = m_.own() + row_ * kStride;
#pragma unroll Shape::kUnroll
    for (int c = 0; c < a_.key_dim; c += 16) {
      const auto left = Product::left_rows(q + c, kStride);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        if (seen.meets(16 * j))
          Product::multiply(logits[j], left,
                            Product::right_columns(s.first + 16 * j * kStride + c, kStride));
    }
  }

  // To the frame of the larger maximum.
  __device__ __forceinline__ void rescale(float (&high)[2]) {
    float decay[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      high[r] = across_quad(high[r], [](float x, float y) { return fmaxf(x, y); });
      decay[r] = weight<Product>(top_[r] - reference_of(high[r]));
      top_[r] = high[r], norm_[r] *= decay[r];
    }
#pragma unroll
    for (int d = 0; d < C / 16; ++d)
#pragma unroll
      for (int e = 0; e < 8; ++e) y_[d].c[e / 4][e % 4] *= decay[e % 4 / 2];
  }

  // Logits to weights, and these times the values. The sums are those of the rounded weights.
  __device__ __forceinline__ void add_values(const WindowStage<Shape>& s, int j, Tile& logits) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float& x = logits.c[e / 4][e % 4];
      x = Product::rounded(weight<Product>(x - reference_of(top_[e % 4 / 2])));
      norm_[e % 4 / 2] += x;
    }
    const auto left = Product::left(logits);
#pragma unroll
    for (int d = 0; d < C / 16; ++d)
      if (16 * d < a_.dim)
        Product::multiply(y_[d], left,
                          Product::right_rows(s.second + 16 * j * kStride + 16 * d, kStride));
  }

  __device__ __forceinline__ void finish() {
    float log_sum[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float norm = across_quad(norm_[r], [](float x, float y) { return x + y; });
      log_sum[r] = norm == 0 ? -kInfinity : top_[r] + logf(norm);
      norm_[r] = norm == 0 ? 0 : 1 / norm;
    }
    const int64_t first = w_.begin + row_, rows = w_.tokens - first;
    if (a_.log_sum.data && lane_id() % 4 == 0)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (tile_row(2 * r) < rows)
          store_number(a_.log_sum, w_.batch, w_.head, w_.first + first + tile_row(2 * r),
                       log_sum[r]);
    scale_rows(norm_);
    write(a_.wide, rows);
    if (a_.gate.logits.data) mix(rows);
    write(a_.y, rows);
  }

  __device__ __forceinline__ void scale_rows(const float (&factor)[2]) {
#pragma unroll
    for (int d = 0; d < C / 16; ++d)
#pragma unroll
      for (int e = 0; e < 8; ++e) y_[d].c[e / 4][e % 4] *= factor[e % 4 / 2];
  }

  __device__ __forceinline__ Slice own_rows(const HeadRows& rows) const {
    return rows_from(rows, w_.batch, w_.head, w_.first + w_.begin + row_, a_.dim);
  }
  __device__ __forceinline__ void write(const HeadRows& to, int64_t rows) {
    if (!to.data) return;
    const Target target(own_rows(to));
#pragma unroll
    for (int d = 0; d < C / 16; ++d) target.store_tile(0, 16 * d, rows, y_[d]);
  }

  // y = share y + rest of the latents' output, which it replaces.
  __device__ __forceinline__ void mix(int64_t rows) {
    float share[2] = {}, rest[2] = {};
#pragma unroll 1
    for (int row = 0; row < 16 && row < rows; ++row) {
      const Shares<float> shares =
          shares_of<float>(a_.gate, w_.batch, w_.head, w_.first + w_.begin + row_ + row);
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (row == tile_row(2 * r)) share[r] = shares.share, rest[r] = shares.rest;
    }
    scale_rows(share);
    if (a_.gate.latents > 0) {
      const Slice from = own_rows(a_.global);
      const float* const data = static_cast<const float*>(a_.global.data) + from.first;
#pragma unroll
      for (int d = 0; d < C / 16; ++d)
        for_each_of_rows(y_[d], [&](int half, int row, int column, float& x) {
          const int c = 16 * d + column;
          if (row < rows && c < from.width)
            x += rest[half] * global_load(data + row * a_.global.stride_t + c * a_.global.stride_c);
        });
    }
    write(a_.global, rows);
  }

  const WindowArgs& a_;
  const WindowTile w_;
  const WindowMemory<Shape> m_;
  const int row_;  // of the warp
  float top_[2] = {-kInfinity, -kInfinity}, norm_[2] = {};
  Tile y_[C / 16];
};

template <class Shape>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    window_forward(const __grid_constant__ WindowArgs a) {
  WindowTile w;
  if (find_tile<Side::queries>(a, blockIdx.x, a.heads, w)) WindowForwardBlock<Shape>(a, w).run();
}

}  // namespace latte::cuda
