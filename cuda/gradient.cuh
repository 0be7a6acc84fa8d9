// SPDX-License-Identifier: Apache-2.0
// The backward pass of latent attention. With S and Z the unnormalised sum and the norm of a latent
// in some frame, mean = S / Z, and w = exp(k - frame):
//   r_t = p_t / Z_t     dp_t = dy_t . S_t / Z_t     dq_t = p_t (dp_t - <p_t, dp_t>)
//   dS_s = sum_(t>=s) r_t (x) dy_t     dZ_s = -sum_(t>=s) r_t dp_t
//   dv_s = sum_l w_sl dS_s             dk_s = w_s (v_s . dS_s + dZ_s)
// Queries are walked first, forward with S; they leave dq and the factors r and r dp. Keys are
// walked second, back with dS and dZ. Both walks cut D and L into slices of blocks: r dp and dk are
// then partial sums over slices of D, dv over slices of L and over the heads that share keys.
// Where a block has whole rows, they leave no factors but a number per token and Z before every
// chunk, and the walk of the keys finds r in q again, and
//   r_t dp_t = dq_t / (scale Z_t) + r_t <p_t, dp_t>,
// at 12 instead of 14 rows of memory per token.
#pragma once

#include "cuda/attention_state.cuh"

namespace latte::cuda {

// dS and dZ behind some tokens, in the frame of the keys before them, per query head.
struct GradientView {
  View sum;   // (N,H,L,D)
  View norm;  // (N,H,slices of D,L), partial sums

  __host__ __device__ __forceinline__ bool present() const { return sum.data != nullptr; }
};

struct GradientArgs : AttentionArgs {
  HeadRows dy, dq, dk, dv;
  HeadRows r, product;  // r and r dp, of `padded` latents
  int padded = 0;
  bool whole = true;  // dq has all of L and D; else it receives p dp
  View d_log_sum;     // optional (B,H,T)
  View along;         // (B,H,T), <p, dp> less d_log_sum: there are no factors
  // The running maximum before every chunk, and without factors Z, (chunks,heads,L) where
  // `border_chunks` belong to a batch and one more to every part.
  float *borders = nullptr, *norms = nullptr;
  int64_t border_chunks = 0;
  GradientView part;    // of the queries of each part
  GradientView behind;  // the part or the sequence
  bool behind_part = false;
  GradientView front;  // of the sequence

  __device__ __forceinline__ int64_t border(const Work& w, int64_t chunk, int l) const {
    const int64_t slot = w.batch * border_chunks + w.first / kChunk + w.sequence * parts + w.part;
    return ((slot + chunk) * heads + w.head) * latents + w.latent + l;
  }
  __device__ __forceinline__ float* along_of(const Work& w, int64_t t) const {
    return along.at<float>(w.batch, w.head, w.first + t);
  }
};

// The softmax of 16 rows of q in shared memory, by a warp.
template <class Shape>
class RowWeights {
 public:
  using Product = typename Shape::Product;
  using E = typename Shape::Element;
  static constexpr int kLatentTiles = Shape::L / 16;

  __device__ __forceinline__ RowWeights(const E* q, const Logits& form) : q_(q), form_(form) {}

  __device__ __forceinline__ void load(const AttentionArgs& a, const Work& w, int64_t t) {
    load_softmax(a, w, t, max_, inverse_sum_);
  }
  __device__ __forceinline__ void find() {
    float high[2] = {-kInfinity, -kInfinity}, sum[2] = {};
#pragma unroll
    for (int i = 0; i < kLatentTiles; ++i) {
      const Tile q = logits(i);
#pragma unroll
      for (int e = 0; e < 8; ++e) high[e % 4 / 2] = fmaxf(high[e % 4 / 2], q.c[e / 4][e % 4]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      max_[r] = reference_of(across_quad(high[r], [](float x, float y) { return fmaxf(x, y); }));
      inverse_sum_[r] = 1;
    }
#pragma unroll
    for (int i = 0; i < kLatentTiles; ++i) {
      const Tile p = probabilities(i);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e % 4 / 2] += p.c[e / 4][e % 4];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = across_quad(sum[r], [](float x, float y) { return x + y; });
      inverse_sum_[r] = sum[r] > 0 ? 1 / sum[r] : 0;
    }
  }

  // Of latents 16 i and on.
  __device__ __forceinline__ Tile probabilities(int i) const {
    Tile p = logits(i);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float& x = p.c[e / 4][e % 4];
      x = weight<Product>(x - max_[e % 4 / 2]) * inverse_sum_[e % 4 / 2];
    }
    return p;
  }

 private:
  __device__ __forceinline__ Tile logits(int i) const {
    Tile q = load_tile(q_ + 16 * i, Shape::kLStride);
    for_each_element(q, [&](int, int l, float& x) {
      x = 16 * i + l < form_.latents ? form_.scale * x : -kInfinity;
    });
    return q;
  }

  const E* const q_;
  const Logits form_;
  float max_[2], inverse_sum_[2];
};

// dS of a block and dZ of its own latent, in and out of memory.
template <class Shape>
__device__ __forceinline__ void load_gradient(StateTiles<Shape>& sum, float* norm,
                                              const GradientView& from, const GradientArgs& a,
                                              int64_t n, const Work& w) {
  for_own_latents<Shape>([&](int l) {
    const bool there = from.present() && w.slice == 0 && w.latent + l < a.latents;
    norm[l] = there ? *from.norm.at<float>(n, w.head, 0, w.latent + l) : 0;
  });
  sum.for_each([&](int l, int d, float& x) {
    const bool there = from.present() && w.latent + l < a.latents && w.channel + d < a.dim;
    x = there ? *from.sum.at<float>(n, w.head, w.latent + l, w.channel + d) : 0;
  });
}
template <class Shape>
__device__ __forceinline__ void store_gradient(StateTiles<Shape>& sum, const float* norm,
                                               const GradientView& to, const GradientArgs& a,
                                               int64_t n, const Work& w) {
  for_own_latents<Shape>([&](int l) {
    if (w.latent + l < a.latents) *to.norm.at<float>(n, w.head, w.slice, w.latent + l) = norm[l];
  });
  sum.for_each([&](int l, int d, float& x) {
    if (w.latent + l < a.latents && w.channel + d < a.dim)
      *to.sum.at<float>(n, w.head, w.latent + l, w.channel + d) = x;
  });
}

}  // namespace latte::cuda
