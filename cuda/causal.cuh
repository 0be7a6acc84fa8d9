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
        q_(slice_of(a.q, w, w.head, 0, a.latents)),
        k_(slice_of(a.k, w, w.kv_head, 0, a.latents)),
        v_(slice_of(a.v, w, w.kv_head, w.channel, a.dim)),
        y_(slice_of(a.y, w, w.head, w.channel, a.dim)) {}

  __device__ __forceinline__ void run() {
    const int64_t chunks = ceil_div(w_.tokens, kChunk);
    if (chunks > 0) load(0);
    state_.load(m_, a_.initial, a_, state_number(a_.initial_of_part), w_);
    walk_chunks<Shape::kStages>(
        chunks, [&](int64_t c) { load(c); },
        [&](int64_t c) { walk(c * kChunk, m_.stage(c % Shape::kStages)); });
    if (!writes_state()) return;
    __syncthreads();
    state_.store(m_, a_.final, a_, state_number(a_.final_of_part), w_);
  }

 private:
  __device__ __forceinline__ int64_t state_number(bool of_part) const {
    return of_part ? w_.sequence * a_.parts + w_.part : w_.sequence;
  }
  // Heads that share keys have one state: the first of them writes it, after the last token.
  __device__ __forceinline__ bool writes_state() const {
    if (!a_.final.present()) return false;
    if constexpr (!Shape::kHasQueries) return true;
    return w_.part == a_.parts - 1 && w_.head % (a_.heads / a_.kv_heads) == 0;
  }
  __device__ __forceinline__ bool is_key(int64_t t) const {
    return t < w_.tokens &&
           (!a_.key_mask ||
            a_.key_mask[w_.batch * a_.mask_stride_b + (w_.first + t) * a_.mask_stride_t]);
  }

  __device__ __forceinline__ void load(int64_t chunk) const {
    const int64_t t = chunk * kChunk;
    const Stage<Shape> s = m_.stage(chunk % Shape::kStages);
    const auto is_key = [&](int row) { return this->is_key(t + row); };
    load_rows<E, Shape::L>(s.k, k_, t, is_key);
    load_rows<E, Shape::D>(s.v, v_, t, is_key);
    if constexpr (Shape::kHasQueries)
      load_rows<E, Shape::L>(s.q, q_, t, [&](int row) { return t + row < w_.tokens; });
    if (threadIdx.x < kChunk) s.used[threadIdx.x] = is_key(threadIdx.x);
    async_copy_commit();
  }

  // Ends with a barrier after the last use of the stage.
  __device__ __forceinline__ void walk(int64_t t, const Stage<Shape>& s) {
    find_extremes(m_, s, a_);
    __syncthreads();
    if (__syncthreads_or(choose_frames(m_))) return walk_rows(t, s);
    find_weights(m_, s, a_);
    state_.scale(m_);
    if constexpr (Shape::kHasQueries) {
      state_.share(m_);
      __syncthreads();
      QueryRows<Shape> rows(s, a_);
      rows.divide([&](int i) { return rows.causal_normaliser(m_, s, i); });
      rows.add_state(m_);
      rows.add_chunk(m_, s);
      rows.store(y_, t, w_.tokens - t);
    } else {
      __syncthreads();
    }
    state_.add(m_, s);
    __syncthreads();
    add_sums(m_);
  }

  // Row by row: exact whatever the range of the keys. Decays and weights of the row take the place
  // of the chunk's.
  __device__ __forceinline__ void walk_rows(int64_t t, const Stage<Shape>& s) {
    const int rows = static_cast<int>(least(kChunk, w_.tokens - t));
    for (int row = 0; row < rows; ++row) {
      for_own_latents<Shape>([&](int l) {
        const float k = key_at(s, row, l, a_), before = m_.maximum()[l], after = fmaxf(before, k);
        const float decay = expf(before - reference_of(after)), w = expf(k - reference_of(after));
        m_.maximum()[l] = after;
        m_.norm()[l] = m_.norm()[l] * decay + w;
        m_.decay()[l] = decay, m_.frame()[l] = w;
      });
      __syncthreads();
      state_.for_each([&](int l, int d, float& x) {
        x = x * m_.decay()[l] + m_.frame()[l] * to_compute(s.v[row * Shape::kDStride + d]);
      });
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
    float high = -kInfinity, sum = 0;
    for (int l = lane_id(); l < a_.latents; l += 32) high = fmaxf(high, logit(l));
    high = reference_of(across_warp(high, [](float x, float y) { return fmaxf(x, y); }));
    for (int l = lane_id(); l < a_.latents; l += 32) sum += expf(logit(l) - high);
    sum = across_warp(sum, [](float x, float y) { return x + y; });
    for_own_latents<Shape>([&](int l) {
      const float norm = l < a_.latents ? m_.norm()[l] : 0;
      m_.largest()[l] = norm > 0 && sum > 0 ? expf(logit(l) - high) / (sum * norm) : 0;
    });
    __syncthreads();
    state_.sum_latents([&](int l) { return m_.largest()[l]; }, sums + warp_id() * Shape::D);
    __syncthreads();
    for (int d = threadIdx.x; d < Shape::D; d += kAttentionThreads)
      y_.store(t, d,
               sums[d] + sums[Shape::D + d] + sums[2 * Shape::D + d] + sums[3 * Shape::D + d]);
  }

  const AttentionArgs& a_;
  const Work w_;
  const SharedMemory<Shape> m_;
  const Slice q_, k_, v_;
  const Target y_;
  StateTiles<Shape> state_;
};

template <class Shape>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    causal_forward(const __grid_constant__ AttentionArgs a) {
  CausalBlock<Shape>(a, find_work<Shape::D>(a, a.heads)).run();
}

template <class Shape>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    key_summary(const __grid_constant__ AttentionArgs a) {
  CausalBlock<Shape>(a, find_work<Shape::D>(a, a.kv_heads)).run();
}

}  // namespace latte::cuda
