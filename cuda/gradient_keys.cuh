// SPDX-License-Identifier: Apache-2.0
// The keys' half of the backward pass: dk and dv, walking back with dS and dZ. A chunk's frame is
// the running maximum at its end, which is that before the next: dS needs no other on its way.
#pragma once

#include "cuda/gradient.cuh"

namespace latte::cuda {

// The 16 rows of a warp. Without queries dS and dZ are those of the whole sequence.
template <class Shape>
class KeyGradientRows {
 public:
  using Product = typename Shape::Product;
  using Left = typename Product::Left;
  static constexpr int kLatentTiles = Shape::L / 16, kDimTiles = Shape::D / 16;
  static constexpr int kRowTiles = kChunk / 16;

  __device__ __forceinline__ KeyGradientRows(const SharedMemory<Shape>& m, const Stage<Shape>& s)
      : m_(m), s_(s), row_(warp_id() * 16) {}

  // dv = w dS + triu(w r^T) dy.
  __device__ __forceinline__ void write_values(const Target& dv, int64_t t, int64_t rows) {
    find_scores<kLatentTiles>([&](int i) { return weights(i); },
                              [&](int row, int i) {
                                return Product::right_columns(
                                    s_.r + row * Shape::kWeightStride + 16 * i,
                                    Shape::kWeightStride);
                              });
    // One at a time, as the registers are dS's.
#pragma unroll 1
    for (int j = 0; j < kDimTiles; ++j) {
      Tile sum;
#pragma unroll
      for (int i = 0; i < kLatentTiles; ++i)
        Product::multiply(sum, weights(i),
                          Product::right_rows(m_.state() + 16 * i * Shape::kStateStride + 16 * j,
                                              Shape::kStateStride));
      add_later(sum, [&](int row) {
        return Product::right_rows(s_.dy + row * Shape::kDStride + 16 * j, Shape::kDStride);
      });
      dv.store_tile(t + row_, 16 * j, rows - row_, sum);
    }
  }

  // dk = w (v dS^T + dZ + triu(v dy^T) r - triu(1) (r dp)).
  __device__ __forceinline__ void write_keys(const Target& dk, int64_t t, int64_t rows,
                                             float scale) {
    find_scores<kDimTiles>([&](int j) { return values(j); },
                           [&](int row, int j) {
                             return Product::right_columns(s_.dy + row * Shape::kDStride + 16 * j,
                                                           Shape::kDStride);
                           });
#pragma unroll 1
    for (int i = 0; i < kLatentTiles; ++i) {
      Tile sum;
      for_each_element(sum, [&](int, int l, float& x) { x = m_.norm()[16 * i + l]; });
#pragma unroll
      for (int j = 0; j < kDimTiles; ++j)
        Product::multiply(sum, values(j),
                          Product::right_columns(m_.state() + 16 * i * Shape::kStateStride + 16 * j,
                                                 Shape::kStateStride));
      add_later(sum, [&](int row) {
        return Product::right_rows(s_.r + row * Shape::kWeightStride + 16 * i,
                                   Shape::kWeightStride);
      });
      subtract_products(sum, i);
      const Tile w = Product::tile(weights(i));
#pragma unroll
      for (int e = 0; e < 8; ++e) sum.c[e / 4][e % 4] *= scale * w.c[e / 4][e % 4];
      dk.store_tile(t + row_, 16 * i, rows - row_, sum);
    }
  }

 private:
  __device__ __forceinline__ Left weights(int i) const {
    return Product::left_rows(m_.weights(s_) + row_ * Shape::kWeightStride + 16 * i,
                              Shape::kWeightStride);
  }
  __device__ __forceinline__ Left values(int j) const {
    return Product::left_rows(s_.v + row_ * Shape::kDStride + 16 * j, Shape::kDStride);
  }

  // Of the own keys with the queries that see them: sums over kTiles of left times right.
  template <int kTiles, class LeftOf, class RightOf>
  __device__ __forceinline__ void find_scores(LeftOf left, RightOf right) {
    if constexpr (Shape::kHasFactors) {
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
        const int row = 16 * n;
        if (row < row_) continue;
        Tile score;
#pragma unroll 1
        for (int i = 0; i < kTiles; ++i) Product::multiply(score, left(i), right(row, i));
        if (row == row_)
          for_each_element(score, [](int key, int t, float& x) { x = key <= t ? x : 0; });
        scores_[n] = Product::left(score);
      }
    }
  }
  template <class RightOf>
  __device__ __forceinline__ void add_later(Tile& sum, RightOf right) const {
    if constexpr (Shape::kHasFactors) {
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n)
        if (16 * n >= row_) Product::multiply(sum, scores_[n], right(16 * n));
    }
  }
  // r dp of the own and all later rows of the chunk.
  __device__ __forceinline__ void subtract_products(Tile& sum, int i) const {
    if constexpr (Shape::kHasFactors) {
      const auto product = [&](int row) {
        return Product::right_rows(s_.product + row * Shape::kWeightStride + 16 * i,
                                   Shape::kWeightStride);
      };
      Tile own, later;
      for_each_element(own, [](int key, int t, float& x) { x = key <= t ? -1 : 0; });
      for_each_element(later, [](int, int, float& x) { x = -1; });
      Product::multiply(sum, Product::left(own), product(row_));
#pragma unroll 1
      for (int row = row_ + 16; row < kChunk; row += 16)
        Product::multiply(sum, Product::left(later), product(row));
    }
  }

  const SharedMemory<Shape>& m_;
  const Stage<Shape>& s_;
  const int row_;
  Left scores_[kRowTiles];
};

template <class Shape>
class KeyGradientBlock {
 public:
  using E = typename Shape::Element;
  using Factor = typename Shape::Factor;
  static_assert(Shape::L <= kAttentionThreads, "a thread keeps the frame of its only latent");

  __device__ __forceinline__ KeyGradientBlock(const GradientArgs& a, const Work& w)
      : a_(a),
        w_(w),
        form_(logits_of(a, w)),
        k_(slice_of(a.k, w, w.kv_head, w.latent, a.latents)),
        v_(slice_of(a.v, w, w.kv_head, w.channel, a.dim)),
        dy_(slice_of(a.dy, w, w.head, w.channel, a.dim)),
        r_(Shape::kRecalls ? slice_of(a.q, w, w.head, w.latent, a.latents)
                           : slice_of(a.r, w, w.head, w.latent, a.padded)),
        product_(Shape::kRecalls ? slice_of(a.dq, w, w.head, w.latent, a.latents)
                                 : slice_of(a.product, w, w.head, w.latent, a.padded, w.slice)),
        inverse_scale_(1 / a.scale),
        dk_(slice_of(a.dk, w, w.head, w.latent, a.latents, w.slice)),
        dv_(slice_of(a.dv, w, w.head, w.channel, a.dim, w.latent / Shape::L)) {}

  __device__ __forceinline__ void run() {
    const int64_t chunks = ceil_div(w_.tokens, kChunk);
    if (chunks > 0) load(chunks - 1, 0);
    load_gradient(sum_, m_.norm(), a_.behind, a_, state_number(a_, w_, a_.behind_part), w_);
    if constexpr (!Shape::kHasFactors) {
      sum_.share(m_);
      for_own_latents<Shape>([&](int l) {
        const bool there = l < form_.latents;
        m_.frame()[l] =
            there ? *a_.initial.max.at<float>(w_.sequence, w_.kv_head, w_.latent + l) : -kInfinity;
      });
    }
    const auto stage = [&](int64_t i) { return stage_of(i, a_.stages); };
    walk_chunks(
        chunks, a_.stages, [&](int64_t i) { load(chunks - 1 - i, stage(i)); },
        [&](int64_t i) { walk(chunks - 1 - i, m_.stage(stage(i))); });
    if (a_.front.present() && w_.part == 0)
      store_gradient(sum_, m_.norm(), a_.front, a_, w_.sequence, w_);
  }

 private:
  __device__ __forceinline__ void load(int64_t chunk, int stage) const {
    const int64_t t = chunk * kChunk;
    const Stage<Shape> s = m_.stage(stage);
    load_keys(s, k_, v_, t, a_, w_);
    if constexpr (Shape::kHasFactors) {
      const auto is_token = [&](int row) { return t + row < w_.tokens; };
      load_rows<E, Shape::D>(s.dy, dy_, t, is_token);
      load_rows<Factor, Shape::L>(s.r, r_, t, is_token);
      load_rows<Factor, Shape::L>(s.product, product_, t, is_token);
    }
    async_copy_commit();
  }

  // Ends with a barrier after the last use of the stage.
  __device__ __forceinline__ void walk(int64_t chunk, const Stage<Shape>& s) {
    const int64_t t = chunk * kChunk;
    if constexpr (Shape::kHasFactors) {
      for_own_latents<Shape>([&](int l) {
        const int64_t at = a_.border(w_, chunk, l);
        m_.maximum()[l] = l < form_.latents ? global_load(a_.borders + at) : -kInfinity;
        if constexpr (Shape::kRecalls)
          m_.share()[l] = l < form_.latents ? global_load(a_.norms + at) : 0;
      });
      find_extremes(m_, s, form_);
      __syncthreads();
      if (__syncthreads_or(choose_frames(m_, s, form_))) return walk_rows(t, s);
      if constexpr (Shape::kRecalls)
        for_own_latents<Shape>([&](int l) { m_.share()[l] *= m_.decay()[l]; });
      sum_.share(m_);
    }
    find_weights(m_, s, form_);
    __syncthreads();
    if constexpr (Shape::kRecalls) {
      find_factors(t, s);
      __syncthreads();
    }
    KeyGradientRows<Shape> rows(m_, s);
    rows.write_values(dv_, t, w_.tokens - t);
    rows.write_keys(dk_, t, w_.tokens - t, form_.scale);
    __syncthreads();
    if constexpr (Shape::kHasFactors) {
      sum_.add(s.r, s.dy);
      sum_.scale(m_);
      for_own_latents<Shape>([&](int l) {
        float norm = m_.norm()[l];
        for (int row = 0; row < kChunk; ++row)
          norm -= to_compute(s.product[row * Shape::kWeightStride + l]);
        m_.norm()[l] = norm * m_.decay()[l];
      });
      __syncthreads();
    }
  }

  // Of the warp's rows, in the place of q and dq.
  __device__ __forceinline__ void find_factors(int64_t t, const Stage<Shape>& s) const {
    static_assert(std::is_same_v<E, Factor>);
    using Product = typename Shape::Product;
    const int first = warp_id() * 16;
    Factor* const r_rows = s.r + first * Shape::kWeightStride;
    Factor* const product_rows = s.product + first * Shape::kWeightStride;
    float along[2];
    bool is_token[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t token = t + first + tile_row(2 * r);
      is_token[r] = token < w_.tokens;
      along[r] = is_token[r] ? global_load(a_.along_of(w_, token)) : 0;
    }
    RowWeights<Shape> weights(r_rows, form_);
    weights.find();
#pragma unroll 1
    for (int i = 0; i < Shape::L / 16; ++i) {
      Tile r = weights.probabilities(i);
      Tile product = load_tile(product_rows + 16 * i, Shape::kWeightStride);
      const Tile z = find_normalisers(m_, s, m_.share(), first, i);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int h = e / 4, c = e % 4;
        const float norm = z.c[h][c];
        const bool is_there = is_token[c / 2] && norm > 0;
        float& x = r.c[h][c];
        x = is_there ? Product::rounded(quotient<Product>(x, norm)) : 0;
        const float slope = quotient<Product>(inverse_scale_ * product.c[h][c], norm);
        product.c[h][c] = is_there ? slope + x * along[c / 2] : 0;
      }
      // All lanes have read the tiles.
      __syncwarp();
      share_tile<Product>(r_rows + 16 * i, Shape::kWeightStride, r);
      share_tile<Product>(product_rows + 16 * i, Shape::kWeightStride, product);
    }
  }

  // Row by row from the last on, in the frame of each row's maximum.
  __device__ __forceinline__ void walk_rows(int64_t t, const Stage<Shape>& s) {
    for_own_latents<Shape>([&](int l) { frame_ = m_.frame()[l]; });
    for (int row = static_cast<int>(least(kChunk, w_.tokens - t)) - 1; row >= 0; --row) {
      const E *const dy = s.dy + row * Shape::kDStride, *const v = s.v + row * Shape::kDStride;
      [[maybe_unused]] const auto logit = [&](int l) {
        return form_.scale * to_compute(s.r[row * Shape::kWeightStride + l]);
      };
      [[maybe_unused]] RowSoftmax p{};
      [[maybe_unused]] float along = 0;
      if constexpr (Shape::kRecalls) {
        p = row_softmax(static_cast<int>(least(Shape::L, form_.latents)), logit);
        along = global_load(a_.along_of(w_, t + row));
      }
      float* const sums = m_.row_sums();
      for (int i = threadIdx.x; i < 4 * Shape::D; i += kAttentionThreads) sums[i] = 0;
      // Weights and r take the places of the largest keys.
      for_own_latents<Shape>([&](int l) {
        float high = m_.maximum()[l];
        for (int i = 0; i <= row; ++i) high = fmaxf(high, key_at(s, i, l, form_));
        const int at = row * Shape::kWeightStride + l;
        move_frame(l, high);
        float r = to_compute(s.r[at]), product = to_compute(s.product[at]);
        if constexpr (Shape::kRecalls) {
          float norm = m_.share()[l] * expf(m_.maximum()[l] - reference_of(high));
          for (int i = 0; i <= row; ++i) norm += expf(key_at(s, i, l, form_) - reference_of(high));
          r = l < form_.latents && norm > 0 ? Shape::Product::rounded(p(logit(l)) / norm) : 0;
          product = norm > 0 ? inverse_scale_ * product / norm + r * along : 0;
        }
        m_.norm()[l] -= product;
        m_.largest()[l] = expf(key_at(s, row, l, form_) - reference_of(high));
        m_.largest()[Shape::L + l] = r;
      });
      __syncthreads();
      sum_.for_each([&](int l, int d, float& x) {
        x = x * m_.decay()[l] + m_.largest()[Shape::L + l] * to_compute(dy[d]);
      });
      sum_.sum_latents([&](int l) { return m_.largest()[l]; }, sums + warp_id() * Shape::D);
      sum_.sum_channels([&](int d) { return to_compute(v[d]); }, m_.smallest());
      __syncthreads();
      store_row_sums<Shape>(dv_, t + row, sums);
      for_own_latents<Shape>([&](int l) {
        float sum = m_.norm()[l];
        for (int i = 0; i < sum_.kChannelParts; ++i) sum += m_.smallest()[i * Shape::L + l];
        dk_.store(t + row, l, form_.scale * m_.largest()[l] * sum);
      });
      __syncthreads();
    }
    for_own_latents<Shape>([&](int l) { move_frame(l, m_.maximum()[l]); });
    __syncthreads();
    sum_.scale(m_);
    __syncthreads();
  }
  __device__ __forceinline__ void move_frame(int l, float to) {
    m_.decay()[l] = expf(to - reference_of(frame_));
    m_.norm()[l] *= m_.decay()[l];
    frame_ = to;
  }

  const GradientArgs& a_;
  const Work w_;
  const Logits form_;
  const SharedMemory<Shape> m_;
  const Slice k_, v_, dy_;
  const Slice r_, product_;  // or q and dq
  const float inverse_scale_;
  const Target dk_, dv_;
  StateTiles<Shape> sum_;
  float frame_ = 0;
};

template <class Shape>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    key_gradient(const __grid_constant__ GradientArgs a) {
  KeyGradientBlock<Shape>(a, find_work<Shape>(a, a.heads)).run();
}

}  // namespace latte::cuda
