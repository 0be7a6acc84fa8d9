// SPDX-License-Identifier: Apache-2.0
// The query side of a chunk: the 16 rows of a warp, everything between q and y in its registers.
//   r = exp(q - max q) / z,   z = normalisers at the row's token
//   y = (r state + tril(r weights^T) v) / sum exp(q - max q)
// r lives for 16 latents at a time: those of all outgrow the registers.
#pragma once

#include "cuda/attention_state.cuh"

namespace latte::cuda {

// Without keys the state has means, whose normalisers are 1.
template <class Shape>
class QueryRows {
 public:
  using Product = typename Shape::Product;
  using Left = typename Product::Left;
  static constexpr int kLatentTiles = Shape::L / 16, kDimTiles = Shape::D / 16;
  static constexpr int kRowTiles = kChunk / 16;

  __device__ __forceinline__ QueryRows(const SharedMemory<Shape>& m, const Stage<Shape>& s,
                                       const AttentionArgs& a, const Work& w, int64_t t)
      : m_(m),
        s_(s),
        form_(logits_of(a, w)),
        row_(warp_id() * 16),
        t_(t + row_),
        rows_(w.tokens - t_) {
    is_slice_ = a.softmax.data;
    is_slice_ ? load_softmax(a, w, t_, max_, inverse_sum_) : find_maxima();
  }

  __device__ __forceinline__ void write(const Target& y) {
#pragma unroll kUnrolled
    for (int i = 0; i < kLatentTiles; ++i) add_latents(i);
    if constexpr (Shape::kHasKeys) add_chunk();
    find_inverse_sums();
#pragma unroll
    for (int j = 0; j < kDimTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 8; ++e) y_[j].c[e / 4][e % 4] *= inverse_sum_[e % 4 / 2];
      y.store_tile(t_, 16 * j, rows_, y_[j]);
    }
  }

 private:
  // As many latents at a time as the registers hold beside the state.
  static constexpr int kUnrolled = Shape::L <= 64 ? 2 : 1;

  __device__ __forceinline__ Tile logits(int i) const {
    Tile q = load_tile(s_.q + row_ * Shape::kLStride + 16 * i, Shape::kLStride);
    for_each_element(q, [&](int, int l, float& x) {
      x = 16 * i + l < form_.latents ? form_.scale * x : -kInfinity;
    });
    return q;
  }
  __device__ __forceinline__ void find_maxima() {
    float high[2] = {-kInfinity, -kInfinity};
#pragma unroll kUnrolled
    for (int i = 0; i < kLatentTiles; ++i) {
      const Tile q = logits(i);
#pragma unroll
      for (int e = 0; e < 8; ++e) high[e % 4 / 2] = fmaxf(high[e % 4 / 2], q.c[e / 4][e % 4]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      max_[r] = reference_of(across_quad(high[r], [](float x, float y) { return fmaxf(x, y); }));
  }
  // Known already where the block has a slice of the latents.
  __device__ __forceinline__ void find_inverse_sums() {
    if (is_slice_) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = across_quad(sum_[r], [](float x, float y) { return x + y; });
      inverse_sum_[r] = sum > 0 ? 1 / sum : 0;
    }
  }

  // r of latents 16 i and on. Empty latents give 0.
  __device__ __forceinline__ Left factor(int i) {
    Tile x = logits(i), z;
    if constexpr (Shape::kHasKeys) z = find_normalisers(m_, s_, m_.norm(), row_, i);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float& value = x.c[e / 4][e % 4];
      value = weight<Product>(value - max_[e % 4 / 2]);
      sum_[e % 4 / 2] += value;
      if constexpr (Shape::kHasKeys) {
        const float norm = z.c[e / 4][e % 4];
        value = norm > 0 ? quotient<Product>(value, norm) : 0;
      }
    }
    return Product::left(x);
  }

  // y += r state, and the scores r weights^T.
  __device__ __forceinline__ void add_latents(int i) {
    const Left r = factor(i);
#pragma unroll
    for (int j = 0; j < kDimTiles; ++j)
      Product::multiply(y_[j], r,
                        Product::right_rows(m_.state() + 16 * i * Shape::kStateStride + 16 * j,
                                            Shape::kStateStride));
    if constexpr (Shape::kHasKeys) {
      const auto* const w = m_.weights(s_) + 16 * i;
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n)
        if (16 * n <= row_)
          Product::multiply(
              scores_[n], r,
              Product::right_columns(w + 16 * n * Shape::kWeightStride, Shape::kWeightStride));
    }
  }

  // y += tril(scores) v.
  __device__ __forceinline__ void add_chunk() {
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      const int row = 16 * n;
      if (row > row_) continue;
      if (row == row_)
        for_each_element(scores_[n], [](int t, int key, float& x) { x = key <= t ? x : 0; });
      const Left score = Product::left(scores_[n]);
#pragma unroll
      for (int j = 0; j < kDimTiles; ++j)
        Product::multiply(
            y_[j], score,
            Product::right_rows(s_.v + row * Shape::kDStride + 16 * j, Shape::kDStride));
    }
  }

  const SharedMemory<Shape>& m_;
  const Stage<Shape>& s_;
  const Logits form_;
  const int row_;
  const int64_t t_, rows_;  // the first token, and how many are there
  bool is_slice_;
  float max_[2], sum_[2] = {}, inverse_sum_[2];
  Tile y_[kDimTiles], scores_[kRowTiles];
};

}  // namespace latte::cuda
