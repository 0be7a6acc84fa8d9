// SPDX-License-Identifier: Apache-2.0
// The queries' half of the backward pass: dq and the factors r and r dp, walking forward with S.
// Where the keys' half needs it, the block also sums dS and dZ of its own queries, in the frame of
// the keys before its first token.
#pragma once

#include "cuda/gradient.cuh"

namespace latte::cuda {

// Where the rows of a block go.
struct QueryGradientTargets {
  Target dq, r, product;
};

// The 16 rows of a warp.
template <class Shape>
class QueryGradientRows {
 public:
  using Product = typename Shape::Product;
  using Left = typename Product::Left;
  using Factor = typename Shape::Factor;
  static constexpr int kLatentTiles = Shape::L / 16, kDimTiles = Shape::D / 16;
  static constexpr int kRowTiles = kChunk / 16;

  // dp waits for the sum over its row. Registers hold S and dS, or the rows: with both sums, rows
  // are finished elsewhere.
  enum class Kept { registers, shared, nowhere };
  static constexpr Kept kKept = Shape::kHasSlopes                   ? Kept::shared
                                : Shape::kHasKeys && Shape::kHasSum ? Kept::nowhere
                                                                    : Kept::registers;
  static constexpr int kUnrolled = kKept == Kept::registers ? kLatentTiles : 1;
  // dy is read again where registers hold no more than the scores beside the state.
  static constexpr bool kReads = Product::kExact && Shape::kHasKeys;
  static constexpr int kChannelsUnrolled = kReads ? 1 : kDimTiles;

  __device__ __forceinline__ QueryGradientRows(const SharedMemory<Shape>& m, const Stage<Shape>& s,
                                               const GradientArgs& a, const Work& w, int64_t t)
      : m_(m),
        s_(s),
        a_(a),
        w_(w),
        form_(logits_of(a, w)),
        row_(warp_id() * 16),
        t_(t + row_),
        weights_(s.q + row_ * Shape::kLStride, form_) {
    if constexpr (!kReads)
#pragma unroll
      for (int j = 0; j < kDimTiles; ++j) dy_[j] = read_dy(j);
    a.softmax.data ? weights_.load(a, w, t_) : weights_.find();
    if constexpr (Shape::kHasKeys) find_scores();
  }

  __device__ __forceinline__ void write(const QueryGradientTargets& to) {
    const int64_t rows = w_.tokens - t_;
    Tile kept[kKept == Kept::registers ? kLatentTiles : 1];
    float along[2] = {};
#pragma unroll kUnrolled
    for (int i = 0; i < kLatentTiles; ++i) {
      Tile p = weights_.probabilities(i), r, product, dp;
      divide(i, p, r, dp);
      keep(kept, i, dp);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int h = e / 4, c = e % 4;
        // Of the rounded r: v dS and dZ nearly cancel where one key has all the weight.
        r.c[h][c] = Product::rounded(r.c[h][c]);
        product.c[h][c] = Product::rounded(r.c[h][c] * dp.c[h][c]);
        p.c[h][c] *= dp.c[h][c];
        along[c / 2] += p.c[h][c];
      }
      if (Shape::kHasKeys && !a_.along.data) {
        to.product.store_vectors<Factor>(t_, 16 * i, rows, product);
        if (w_.slice == 0) to.r.store_vectors<Factor>(t_, 16 * i, rows, r);
      }
      if (!a_.whole) to.dq.store_tile(t_, 16 * i, rows, p);
      if constexpr (Shape::kHasSum) spread(i, r, product);
    }
    if constexpr (kKept != Kept::nowhere)
      if (a_.whole) store_whole(to.dq, rows, kept, along);
  }

 private:
  __device__ __forceinline__ Left read_dy(int j) const {
    return Product::left_rows(s_.dy + row_ * Shape::kDStride + 16 * j, Shape::kDStride);
  }
  __device__ __forceinline__ Left dy(int j) const {
    if constexpr (kReads) {
      return read_dy(j);
    } else {
      return dy_[j];
    }
  }
  // tril(dy v^T).
  __device__ __forceinline__ void find_scores() {
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      const int row = 16 * n;
      if (row > row_) continue;
      Tile score;
#pragma unroll kChannelsUnrolled
      for (int j = 0; j < kDimTiles; ++j)
        Product::multiply(
            score, dy(j),
            Product::right_columns(s_.v + row * Shape::kDStride + 16 * j, Shape::kDStride));
      if (row == row_)
        for_each_element(score, [](int t, int key, float& x) { x = key <= t ? x : 0; });
      scores_[n] = Product::left(score);
    }
  }

  // r = p / Z and dp, of latents 16 i and on. Empty latents give 0.
  __device__ __forceinline__ void divide(int i, const Tile& p, Tile& r, Tile& dp) const {
#pragma unroll kChannelsUnrolled
    for (int j = 0; j < kDimTiles; ++j)
      Product::multiply(dp, dy(j),
                        Product::right_columns(m_.state() + 16 * i * Shape::kStateStride + 16 * j,
                                               Shape::kStateStride));
    Tile z;
    if constexpr (Shape::kHasKeys) {
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n)
        if (16 * n <= row_)
          Product::multiply(
              dp, scores_[n],
              Product::right_rows(m_.weights(s_) + 16 * n * Shape::kWeightStride + 16 * i,
                                  Shape::kWeightStride));
      z = find_normalisers(m_, s_, m_.norm(), row_, i);
    } else {
      for_each_element(z, [&](int, int l, float& x) { x = m_.norm()[16 * i + l]; });
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int h = e / 4, c = e % 4;
      const float norm = z.c[h][c];
      r.c[h][c] = norm > 0 ? quotient<Product>(p.c[h][c], norm) : 0;
      dp.c[h][c] = norm > 0 ? quotient<Product>(dp.c[h][c], norm) : 0;
    }
  }

  // A lane reads back what it wrote itself.
  template <int kCount>
  __device__ __forceinline__ void keep(Tile (&kept)[kCount], int i, const Tile& dp) const {
    if constexpr (kKept == Kept::registers) kept[i] = dp;
    if constexpr (kKept == Kept::shared)
      share_tile<Product>(m_.slopes() + row_ * Shape::kWeightStride + 16 * i, Shape::kWeightStride,
                          dp);
  }
  template <int kCount>
  __device__ __forceinline__ Tile kept_tile(const Tile (&kept)[kCount], int i) const {
    if constexpr (kKept == Kept::registers) return kept[i];
    return load_tile(m_.slopes() + row_ * Shape::kWeightStride + 16 * i, Shape::kWeightStride);
  }

  template <int kCount>
  __device__ __forceinline__ void store_whole(const Target& dq, int64_t rows,
                                              const Tile (&kept)[kCount], float (&along)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      along[r] = across_quad(along[r], [](float x, float y) { return x + y; });
      const int64_t t = t_ + tile_row(2 * r);
      if (a_.d_log_sum.data && t < w_.tokens)
        along[r] -= global_load(a_.d_log_sum.template at<float>(w_.batch, w_.head, w_.first + t));
      if (a_.along.data && t < w_.tokens && tile_column(0, 0) == 0)
        global_store(a_.along_of(w_, t), along[r]);
    }
#pragma unroll kUnrolled
    for (int i = 0; i < kLatentTiles; ++i) {
      Tile p = weights_.probabilities(i);
      const Tile dp = kept_tile(kept, i);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        p.c[e / 4][e % 4] *= form_.scale * (dp.c[e / 4][e % 4] - along[e % 4 / 2]);
      dq.store_tile(t_, 16 * i, rows, p);
    }
  }

  // r as factors of dS, and the warp's part of dZ.
  __device__ __forceinline__ void spread(int i, Tile& r, const Tile& product) const {
    for_each_element(r, [&](int, int l, float& x) { x *= m_.share()[16 * i + l]; });
    share_tile<Product>(m_.spread() + row_ * Shape::kWeightStride + 16 * i, Shape::kWeightStride,
                        r);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float sum = product.c[e / 2][e % 2] + product.c[e / 2][e % 2 + 2];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      const int l = 16 * i + tile_column(e / 2, e % 2);
      if (lane_id() < 4) m_.smallest()[warp_id() * Shape::L + l] = sum * m_.share()[l];
    }
  }

  const SharedMemory<Shape>& m_;
  const Stage<Shape>& s_;
  const GradientArgs& a_;
  const Work& w_;
  const Logits form_;
  const int row_;
  const int64_t t_;
  RowWeights<Shape> weights_;
  Left dy_[kReads ? 1 : kDimTiles], scores_[kRowTiles];
};

template <class Shape>
class QueryGradientBlock {
 public:
  using E = typename Shape::Element;
  using Product = typename Shape::Product;
  static_assert(Shape::L <= kAttentionThreads, "a thread keeps dZ of its only latent");

  __device__ __forceinline__ QueryGradientBlock(const GradientArgs& a, const Work& w)
      : a_(a),
        w_(w),
        form_(logits_of(a, w)),
        q_(slice_of(a.q, w, w.head, w.latent, a.latents)),
        k_(slice_of(a.k, w, w.kv_head, w.latent, a.latents)),
        v_(slice_of(a.v, w, w.kv_head, w.channel, a.dim)),
        dy_(slice_of(a.dy, w, w.head, w.channel, a.dim)),
        to_{Target(slice_of(a.dq, w, w.head, w.latent, a.latents, w.slice)),
            Target(slice_of(a.r, w, w.head, w.latent, a.padded)),
            Target(slice_of(a.product, w, w.head, w.latent, a.padded, w.slice))} {}

  __device__ __forceinline__ void run() {
    const int64_t chunks = ceil_div(w_.tokens, kChunk);
    if (chunks > 0) load(0);
    state_.load(m_, a_.initial, a_, state_number(a_, w_, a_.initial_of_part), w_);
    if constexpr (!Shape::kHasKeys) state_.share(m_);
    if constexpr (Shape::kHasSum)
      for_own_latents<Shape>([&](int l) { start_ = m_.maximum()[l], m_.share()[l] = 1; });
    walk_chunks(
        chunks, a_.stages, [&](int64_t c) { load(c); },
        [&](int64_t c) { walk(c, m_.stage(stage_of(c, a_.stages))); });
    __syncthreads();
    if constexpr (Shape::kHasSum) store_sum();
    if constexpr (Shape::kHasKeys)
      if (a_.final.present() && w_.part == a_.parts - 1 && w_.head % (a_.heads / a_.kv_heads) == 0)
        state_.store(m_, a_.final, a_, w_.sequence, w_);
  }

 private:
  __device__ __forceinline__ void load(int64_t chunk) const {
    const int64_t t = chunk * kChunk;
    const Stage<Shape> s = m_.stage(stage_of(chunk, a_.stages));
    const auto is_token = [&](int row) { return t + row < w_.tokens; };
    if constexpr (Shape::kHasKeys) load_keys(s, k_, v_, t, a_, w_);
    load_rows<E, Shape::L>(s.q, q_, t, is_token);
    load_rows<E, Shape::D>(s.dy, dy_, t, is_token);
    async_copy_commit();
  }

  // Ends with a barrier after the last use of the stage.
  __device__ __forceinline__ void walk(int64_t chunk, const Stage<Shape>& s) {
    const int64_t t = chunk * kChunk;
    if constexpr (Shape::kHasKeys) {
      find_extremes(m_, s, form_);
      __syncthreads();
      const bool is_wide = choose_frames(m_, s, form_);
      note_border(chunk);
      if (__syncthreads_or(is_wide)) return walk_rows(t, s);
      find_weights(m_, s, form_);
      enter_frame(m_);
      state_.scale(m_);
      state_.share(m_);
      if constexpr (Shape::kHasSum) find_share();
      __syncthreads();
    }
    QueryGradientRows<Shape>(m_, s, a_, w_, t).write(to_);
    if constexpr (Shape::kHasSum) {
      __syncthreads();
      sum_.add(m_.spread(), s.dy);
      for_own_latents<Shape>([&](int l) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d_norm_ -= m_.smallest()[i * Shape::L + l];
      });
    }
    if constexpr (Shape::kHasKeys) state_.add(m_.weights(s), s.v);
    __syncthreads();
    if constexpr (Shape::kHasKeys) add_sums(m_);
  }

  __device__ __forceinline__ void note_border(int64_t chunk) const {
    if (w_.slice == 0)
      for_own_latents<Shape>([&](int l) {
        if (l >= form_.latents) return;
        const int64_t at = a_.border(w_, chunk, l);
        global_store(a_.borders + at, m_.maximum()[l]);
        if (a_.norms) global_store(a_.norms + at, m_.norm()[l]);
      });
  }
  __device__ __forceinline__ void find_share() const {
    for_own_latents<Shape>(
        [&](int l) { m_.share()[l] = expf(start_ - reference_of(m_.maximum()[l])); });
  }

  // Row by row, as CausalBlock does.
  __device__ __forceinline__ void walk_rows(int64_t t, const Stage<Shape>& s) {
    const int rows = static_cast<int>(least(kChunk, w_.tokens - t));
    for (int row = 0; row < rows; ++row) {
      const E* const dy = s.dy + row * Shape::kDStride;
      step_row(m_, s, row, form_);
      if constexpr (Shape::kHasSum) find_share();
      __syncthreads();
      state_.add_row(m_, s.v + row * Shape::kDStride);
      state_.sum_channels([&](int d) { return to_compute(dy[d]); }, m_.smallest());
      __syncthreads();
      // dp takes the place of the largest keys, factors of dS that of the next warp's.
      for_own_latents<Shape>([&](int l) {
        float sum = 0;
        for (int i = 0; i < state_.kChannelParts; ++i) sum += m_.smallest()[i * Shape::L + l];
        m_.largest()[l] = m_.norm()[l] > 0 ? sum / m_.norm()[l] : 0;
      });
      __syncthreads();
      store_row(t + row, s.q + row * Shape::kLStride);
      if constexpr (Shape::kHasSum) {
        __syncthreads();
        sum_.for_each(
            [&](int l, int d, float& x) { x += m_.largest()[Shape::L + l] * to_compute(dy[d]); });
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ void store_row(int64_t t, const E* q) {
    const auto logit = [&](int l) { return form_.scale * to_compute(q[l]); };
    const int latents = static_cast<int>(least(Shape::L, form_.latents));
    const RowSoftmax p = row_softmax(a_, w_, t, latents, logit);
    float along = 0;
    for (int l = lane_id(); l < latents; l += 32) along += p(logit(l)) * m_.largest()[l];
    along = across_warp(along, [](float x, float y) { return x + y; });
    if (a_.d_log_sum.data)
      along -= global_load(a_.d_log_sum.template at<float>(w_.batch, w_.head, w_.first + t));
    if (a_.along.data && threadIdx.x == 0) global_store(a_.along_of(w_, t), along);
    for_own_latents<Shape>([&](int l) {
      const float x = l < latents ? p(logit(l)) : 0, dp = m_.largest()[l], norm = m_.norm()[l];
      to_.dq.store(t, l, a_.whole ? form_.scale * x * (dp - along) : x * dp);
      const float r = Product::rounded(norm > 0 ? x / norm : 0);
      const float product = Product::rounded(r * dp);
      if (!a_.along.data) {
        if (w_.slice == 0) to_.r.store(t, l, r);
        to_.product.store(t, l, product);
      }
      if constexpr (Shape::kHasSum) {
        m_.largest()[Shape::L + l] = r * m_.share()[l];
        d_norm_ -= product * m_.share()[l];
      }
    });
  }

  __device__ __forceinline__ void store_sum() {
    for_own_latents<Shape>([&](int l) { m_.share()[l] = d_norm_; });
    store_gradient(sum_, m_.share(), a_.part, a_, state_number(a_, w_, true), w_);
  }

  const GradientArgs& a_;
  const Work w_;
  const Logits form_;
  const SharedMemory<Shape> m_;
  const Slice q_, k_, v_, dy_;
  const QueryGradientTargets to_;
  StateTiles<Shape> state_, sum_;  // S and, if it is summed, dS
  float start_ = 0, d_norm_ = 0;
};

template <class Shape>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    query_gradient(const __grid_constant__ GradientArgs a) {
  QueryGradientBlock<Shape>(a, find_work<Shape>(a, a.heads)).run();
}

}  // namespace latte::cuda
