// SPDX-License-Identifier: Apache-2.0
// One token per sequence: its key and value go to their slot of the ring, then its queries meet the
// slots and the sinks.
//
// A block per sequence and key/value head. Bound by the traffic of the ring: every slot in use is
// read once for up to kStepHeads query heads of a group (more read it again), q, k and v once, and
// one slot and y are written. Every warp takes every eighth slot under a softmax of its own; at the
// end these are merged in order.
#pragma once

#include "cuda/window_plan.h"
#include "cuda/window_step.h"

namespace latte::cuda {

// The ring of a sequence before its token. Positions on the device are not checked: any is inside.
struct RingPlace {
  int64_t position, slot, used;

  __device__ __forceinline__ RingPlace(const WindowStepParams& p, int64_t n)
      : position(global_load(p.position + n * p.position_stride)),
        slot(position % p.window),
        used(position < p.window ? position + 1 : p.window) {
    if (slot < 0) slot += p.window;
  }
};

// Shared memory of a block.
template <class T>
struct WindowStepShared {
  static constexpr int kWarps = kStepThreads / 32;
  int64_t key_dim, dim;
  T* memory = reinterpret_cast<T*>(shared_memory());

  // Scaled queries to the keys and to the sinks.
  __device__ __forceinline__ T* q(int g, bool to_sinks) const {
    return memory + (2 * g + to_sinks) * key_dim;
  }
  // A warp's part of a head: maximum, sum of weights, and sums of values.
  __device__ __forceinline__ T* part(int warp, int g) const {
    return memory + 2 * kStepHeads * key_dim + (warp * kStepHeads + g) * (2 + dim);
  }
  static constexpr int64_t bytes(int64_t key_dim, int64_t dim) {
    return (2 * kStepHeads * key_dim + kWarps * kStepHeads * (2 + dim)) * int64_t{sizeof(T)};
  }
};

// kPerLane: channels that a lane of a warp has of a row.
template <class T, int kPerLane>
class WindowStepBlock {
 public:
  __device__ __forceinline__ WindowStepBlock(const WindowStepParams& p, int64_t n, int64_t kv_head)
      : p_(p), n_(n), kv_head_(kv_head), place_(p, n), s_{p.key_dim, p.dim} {}

  __device__ __forceinline__ void run() {
    const int thread = static_cast<int>(threadIdx.x);
    for (int64_t c = thread; c < p_.key_dim; c += kStepThreads)
      write<T>(p_.k_ring, n_, kv_head_, place_.slot, c, read<T>(p_.k, n_, kv_head_, c));
    for (int64_t c = thread; c < p_.dim; c += kStepThreads)
      write<T>(p_.v_ring, n_, kv_head_, place_.slot, c, read<T>(p_.v, n_, kv_head_, c));
    for (int64_t g = 0; g < p_.group; g += kStepHeads) {
      const int heads = static_cast<int>(least(kStepHeads, p_.group - g));
      load_queries(kv_head_ * p_.group + g, heads);
      __syncthreads();
      meet_rows();
      __syncthreads();
      if (warp_id() < heads) finish(kv_head_ * p_.group + g + warp_id());
      __syncthreads();
    }
  }

 private:
  static constexpr int kWarps = kStepThreads / 32;
  using Lane = T[kPerLane];  // channels lane, lane + 32, ..

  // Heads that are not there get zeros.
  __device__ __forceinline__ void load_queries(int64_t head, int heads) const {
    const T scale = static_cast<T>(p_.scale);
    for (int64_t i = threadIdx.x; i < kStepHeads * p_.key_dim; i += kStepThreads) {
      const int g = static_cast<int>(i / p_.key_dim);
      const int64_t c = i % p_.key_dim;
      s_.q(g, false)[c] = g < heads ? scale * read<T>(p_.q, n_, head + g, c) : 0;
      if (p_.sinks > 0)
        s_.q(g, true)[c] = g < heads ? scale * read<T>(p_.q_sink, n_, head + g, c) : 0;
    }
  }

  // Slots, or sinks.
  template <bool kSinks>
  __device__ __forceinline__ bool is_seen(int64_t row) const {
    if constexpr (kSinks) {
      if (!p_.sink_position) return true;
      const int64_t sink =
          global_load(p_.sink_position + n_ * p_.sink_stride_n + row * p_.sink_stride_i);
      return is_distant(place_.position, sink, p_.window, true);
    } else {
      return row == place_.slot || p_.valid[n_ * p_.valid_stride_n + row * p_.valid_stride_i];
    }
  }

  __device__ __forceinline__ void load_row(const HeadRows& rows, int64_t row, int64_t channels,
                                           Lane& out) const {
    with_storage_type<T>(rows.dtype, [&](auto type) {
      using S = typename decltype(type)::type;
      const S* const data = static_cast<const S*>(rows.data) + rows.at(n_, kv_head_, row, 0);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int64_t c = lane_id() + 32 * i;
        out[i] = c < channels ? to_compute(global_load(data + c * rows.stride_c)) : T(0);
      }
    });
  }

  // A warp's softmax over the rows that it has met.
  struct Part {
    T top[kStepHeads], norm[kStepHeads];
    Lane sums[kStepHeads];
  };

  __device__ __forceinline__ void meet_rows() const {
    Part part;
#pragma unroll
    for (int g = 0; g < kStepHeads; ++g) {
      part.top[g] = -static_cast<T>(kInfinity), part.norm[g] = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) part.sums[g][i] = 0;
    }
    meet<false>(p_.k_ring, p_.v_ring, place_.used, part);
    if (p_.sinks > 0) meet<true>(p_.k_sink, p_.v_sink, p_.sinks, part);
#pragma unroll
    for (int g = 0; g < kStepHeads; ++g) {
      T* const to = s_.part(warp_id(), g);
      if (lane_id() == 0) to[0] = part.top[g], to[1] = part.norm[g];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (lane_id() + 32 * i < p_.dim) to[2 + lane_id() + 32 * i] = part.sums[g][i];
    }
  }

  template <bool kSinks>
  __device__ __forceinline__ void meet(const HeadRows& keys, const HeadRows& values, int64_t rows,
                                       Part& part) const {
#pragma unroll 1
    for (int64_t row = warp_id(); row < rows; row += kWarps) {
      if (!is_seen<kSinks>(row)) continue;
      Lane k, v;
      load_row(keys, row, p_.key_dim, k);
      load_row(values, row, p_.dim, v);
#pragma unroll
      for (int g = 0; g < kStepHeads; ++g)
        add_row(logit_of(s_.q(g, kSinks), k), v, part.top[g], part.norm[g], part.sums[g]);
    }
  }

  __device__ __forceinline__ T logit_of(const T* q, const Lane& k) const {
    using std::tanh;
    T dot = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (lane_id() + 32 * i < p_.key_dim) dot += k[i] * q[lane_id() + 32 * i];
    dot = across_warp(dot, [](T x, T y) { return x + y; });
    const T softcap = static_cast<T>(p_.softcap);
    return softcap > 0 ? softcap * tanh(dot / softcap) : dot;
  }

  __device__ __forceinline__ static void add_row(T logit, const Lane& v, T& top, T& norm,
                                                 Lane& sums) {
    using std::exp;
    const T high = max(top, logit), frame = finite(high);
    const T decay = exp(top - frame), w = exp(logit - frame);
    top = high, norm = norm * decay + w;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sums[i] = sums[i] * decay + w * v[i];
  }
  // A maximum to subtract: the empty set's is any number.
  __device__ __forceinline__ static T finite(T max) {
    return max == -static_cast<T>(kInfinity) ? T(0) : max;
  }

  // The warps' parts of one query head, by a warp.
  __device__ __forceinline__ void finish(int64_t head) const {
    using std::exp;
    const int g = warp_id();
    T top = s_.part(0, g)[0], factor[kWarps], norm = 0;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) top = max(top, s_.part(w, g)[0]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      factor[w] = exp(s_.part(w, g)[0] - finite(top));
      norm += factor[w] * s_.part(w, g)[1];
    }
    Shares<T> shares = {1, 0};
    if (p_.gate.logits.data) shares = shares_of<T>(p_.gate, n_, head, 0);
    const T share = norm == 0 ? T(0) : shares.share / norm;
    for (int64_t c = lane_id(); c < p_.dim; c += 32) {
      T y = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) y += factor[w] * s_.part(w, g)[2 + c];
      y *= share;
      if (p_.global.data) y += shares.rest * read<T>(p_.global, n_, head, c);
      write<T>(p_.y, n_, head, c, y);
    }
  }

  const WindowStepParams& p_;
  const int64_t n_, kv_head_;
  const RingPlace place_;
  const WindowStepShared<T> s_;
};

template <class T, int kPerLane>
__global__ void __launch_bounds__(kStepThreads, sizeof(T) == 4 && kPerLane <= 4 ? 2 : 1)
    window_step(const __grid_constant__ WindowStepParams p) {
  WindowStepBlock<T, kPerLane>(p, blockIdx.x / p.kv_heads, blockIdx.x % p.kv_heads).run();
}

// Once all heads have read them: a thread per sequence.
__global__ void __launch_bounds__(kStepThreads)
    window_step_advance(const __grid_constant__ WindowStepParams p) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x;
  if (n >= p.sequences) return;
  const RingPlace place(p, n);
  p.valid[n * p.valid_stride_n + place.slot * p.valid_stride_i] = true;
  const uint64_t tokens = static_cast<uint64_t>(place.position) + 1;
  global_store(p.position + n * p.position_stride, static_cast<int64_t>(tokens));
}

}  // namespace latte::cuda
