// SPDX-License-Identifier: Apache-2.0
// The query side of a chunk: the 16 rows of a warp, everything between q and y in its registers.
//   r = exp(q - max q) / z,   z = normalisers at the row's token
//   y = (r state + tril(r weights^T) v) / sum exp(q - max q)
#pragma once

#include "cuda/attention_state.cuh"

namespace latte::cuda {

template <class Shape>
class QueryRows {
 public:
  using Product = typename Shape::Product;
  using Left = typename Product::Left;
  static constexpr int kLatentTiles = Shape::L / 16, kDimTiles = Shape::D / 16;

  __device__ __forceinline__ QueryRows(const Stage<Shape>& s, const Logits& form)
      : row_(warp_id() * 16), form_(form) {
    float high[2] = {-kInfinity, -kInfinity};
#pragma unroll
    for (int i = 0; i < kLatentTiles; ++i) {
      factor_[i] = Product::left_rows(s.q + row_ * Shape::kLStride + 16 * i, Shape::kLStride);
      Tile q = logits(i);
#pragma unroll
      for (int e = 0; e < 8; ++e) high[e % 4 / 2] = fmaxf(high[e % 4 / 2], q.c[e / 4][e % 4]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      max_[r] = reference_of(across_quad(high[r], [](float x, float y) { return fmaxf(x, y); }));
  }

  // q becomes r; z(i) is the tile of normalisers of latents 16 i and on. Empty latents give 0.
  template <class Z>
  __device__ __forceinline__ void divide(Z normaliser) {
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < kLatentTiles; ++i) {
      Tile x = logits(i);
      const Tile z = normaliser(i);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& value = x.c[e / 4][e % 4];
        value = weight<Product>(value - max_[e % 4 / 2]);
        sum[e % 4 / 2] += value;
        const float norm = z.c[e / 4][e % 4];
        value = norm > 0 ? quotient<Product>(value, norm) : 0;
      }
      factor_[i] = Product::left(x);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = across_quad(sum[r], [](float x, float y) { return x + y; });
      inverse_sum_[r] = sum[r] > 0 ? 1 / sum[r] : 0;
    }
  }

  // The normalisers of the own rows: those before the chunk, and the weights up to the row as a
  // product with a triangle of ones, which leaves them where r needs them.
  __device__ __forceinline__ Tile causal_normaliser(const SharedMemory<Shape>& m,
                                                    const Stage<Shape>& s, int i) const {
    Tile z, ones, triangle;
    for_each_element(z, [&](int, int l, float& x) { x = m.norm()[16 * i + l]; });
    for_each_element(ones, [](int, int, float& x) { x = 1; });
    for_each_element(triangle, [](int t, int key, float& x) { x = key <= t; });
    const auto* const w = m.weights(s) + 16 * i;
#pragma unroll 1
    for (int row = 0; row < row_; row += 16)
      Product::multiply(z, Product::left(ones),
                        Product::right_rows(w + row * Shape::kWeightStride, Shape::kWeightStride));
    Product::multiply(z, Product::left(triangle),
                      Product::right_rows(w + row_ * Shape::kWeightStride, Shape::kWeightStride));
    return z;
  }

  // y += r state, from shared memory.
  __device__ __forceinline__ void add_state(const SharedMemory<Shape>& m) {
#pragma unroll
    for (int i = 0; i < kLatentTiles; ++i)
#pragma unroll
      for (int j = 0; j < kDimTiles; ++j)
        Product::multiply(y_[j], factor_[i],
                          Product::right_rows(m.state() + 16 * i * Shape::kStateStride + 16 * j,
                                              Shape::kStateStride));
  }

  // y += tril(r weights^T) v.
  __device__ __forceinline__ void add_chunk(const SharedMemory<Shape>& m, const Stage<Shape>& s) {
#pragma unroll 1
    for (int row = 0; row <= row_; row += 16) {
      Tile score;
#pragma unroll
      for (int i = 0; i < kLatentTiles; ++i)
        Product::multiply(score, factor_[i],
                          Product::right_columns(m.weights(s) + row * Shape::kWeightStride + 16 * i,
                                                 Shape::kWeightStride));
      if (row == row_)
        for_each_element(score, [](int t, int key, float& x) { x = key <= t ? x : 0; });
      const Left a = Product::left(score);
#pragma unroll
      for (int j = 0; j < kDimTiles; ++j)
        Product::multiply(
            y_[j], a, Product::right_rows(s.v + row * Shape::kDStride + 16 * j, Shape::kDStride));
    }
  }

  __device__ __forceinline__ void store(const Target& to, int64_t t, int64_t rows) {
#pragma unroll
    for (int j = 0; j < kDimTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 8; ++e) y_[j].c[e / 4][e % 4] *= inverse_sum_[e % 4 / 2];
      to.store_tile(t + row_, 16 * j, rows - row_, y_[j]);
    }
  }

 private:
  __device__ __forceinline__ Tile logits(int i) const {
    Tile q = Product::tile(factor_[i]);
    for_each_element(q, [&](int, int l, float& x) {
      x = 16 * i + l < form_.latents ? form_.scale * x : -kInfinity;
    });
    return q;
  }
  int row_;
  Logits form_;
  Left factor_[kLatentTiles];  // q, then r
  float max_[2], inverse_sum_[2];
  Tile y_[kDimTiles];
};

}  // namespace latte::cuda
