// SPDX-License-Identifier: Apache-2.0
// Causal latent attention in one pass over q, k and v: y_t = sum_l p(l|t) E[v | l, s <= t].
// A block walks some tokens of one head and slice of D in chunks; nothing of size T x L or T x T
// leaves its registers and shared memory. Without queries it is the summary of the tokens.
#pragma once

#include "cuda/queries.cuh"

namespace latte::cuda {

template <class Shape>
class CausalBlock {
 public:
  using E = typename Shape::Element;

  __device__ __forceinline__ CausalBlock(const AttentionArgs& a, const Work& w)
      : a_(a),
        w_(w),
        logits_(logits_of(a, w)),
        q_(slice_of(a.q, w, w.head, w.latent, a.latents)),
        k_(slice_of(a.k, w, w.kv_head, w.latent, a.latents)),
        v_(slice_of(a.v, w, w.kv_head, w.channel, a.dim)),
        y_(slice_of(a.y, w, w.head, w.channel, a.dim, w.latent / Shape::L)) {}

  __device__ __forceinline__ void run() {
    const int64_t chunks = ceil_div(w_.tokens, kChunk);
    if (chunks > 0) load(0);
    state_.load(m_, a_.initial, a_, state_number(a_, w_, a_.initial_of_part), w_);
    walk_chunks(
        chunks, a_.stages, [&](int64_t c) { load(c); },
        [&](int64_t c) { walk(c * kChunk, m_.stage(stage_of(c, a_.stages))); });
    if (!writes_state()) return;
    __syncthreads();
    state_.store(m_, a_.final, a_, state_number(a_, w_, a_.final_of_part), w_);
  }

 private:
  // Heads that share keys have one state: the first of them writes it, after the last token.
  __device__ __forceinline__ bool writes_state() const {
    if (!a_.final.present()) return false;
    if constexpr (!Shape::kHasQueries) return true;
    return w_.part == a_.parts - 1 && w_.head % (a_.heads / a_.kv_heads) == 0;
  }
  __device__ __forceinline__ void load(int64_t chunk) const {
    const int64_t t = chunk * kChunk;
    const Stage<Shape> s = m_.stage(stage_of(chunk, a_.stages));
    load_keys(s, k_, v_, t, a_, w_);
    if constexpr (Shape::kHasQueries)
      load_rows<E, Shape::L>(s.q, q_, t, [&](int row) { return t + row < w_.tokens; });
    async_copy_commit();
  }

  // Ends with a barrier after the last use of the stage.
  __device__ __forceinline__ void walk(int64_t t, const Stage<Shape>& s) {
    find_extremes(m_, s, logits_);
    __syncthreads();
    if (__syncthreads_or(choose_frames(m_, s, logits_))) return walk_rows(t, s);
    find_weights(m_, s, logits_);
    enter_frame(m_);
    state_.scale(m_);
    if constexpr (Shape::kHasQueries) {
      state_.share(m_);
      __syncthreads();
      QueryRows<Shape>(m_, s, a_, w_, t).write(y_);
    } else {
      __syncthreads();
    }
    state_.add(m_.weights(s), s.v);
    __syncthreads();
    add_sums(m_);
  }

  // Row by row: exact whatever the range of the keys. Decays and weights of the row take the place
  // of the chunk's.
  __device__ __forceinline__ void walk_rows(int64_t t, const Stage<Shape>& s) {
    const int rows = static_cast<int>(least(kChunk, w_.tokens - t));
    for (int row = 0; row < rows; ++row) {
      step_row(m_, s, row, logits_);
      __syncthreads();
      state_.add_row(m_, s.v + row * Shape::kDStride);
      if constexpr (Shape::kHasQueries) store_row(t + row, s.q + row * Shape::kLStride);
      __syncthreads();
    }
  }

  // y of one row: every warp sums over its latents, then threads over the warps. The factors
  // p(l|t) / norm take the place of the weights' sums.
  __device__ __forceinline__ void store_row(int64_t t, const E* q) {
    float* const sums = m_.row_sums();
    for (int i = threadIdx.x; i < 4 * Shape::D; i += kAttentionThreads) sums[i] = 0;
    const auto logit = [&](int l) { return a_.scale * to_compute(q[l]); };
    const int latents = static_cast<int>(least(Shape::L, logits_.latents));
    const RowSoftmax p = row_softmax(a_, w_, t, latents, logit);
    for_own_latents<Shape>([&](int l) {
      const float norm = l < latents ? m_.norm()[l] : 0;
      m_.largest()[l] = norm > 0 ? p(logit(l)) / norm : 0;
    });
    __syncthreads();
    state_.sum_latents([&](int l) { return m_.largest()[l]; }, sums + warp_id() * Shape::D);
    __syncthreads();
    store_row_sums<Shape>(y_, t, sums);
  }

  const AttentionArgs& a_;
  const Work w_;
  const Logits logits_;
  const SharedMemory<Shape> m_;
  const Slice q_, k_, v_;
  const Target y_;
  StateTiles<Shape> state_;
};

template <class Shape>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    causal_forward(const __grid_constant__ AttentionArgs a) {
  CausalBlock<Shape>(a, find_work<Shape>(a, a.heads)).run();
}

template <class Shape>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    key_summary(const __grid_constant__ AttentionArgs a) {
  CausalBlock<Shape>(a, find_work<Shape>(a, a.kv_heads)).run();
}

}  // namespace latte::cuda
