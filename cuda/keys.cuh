// SPDX-License-Identifier: Apache-2.0
// The key side of a chunk: the running maximum of every latent at the chunk's end becomes the frame
// of the chunk, in which
//   weights = exp(k - frame)   decay = exp(maximum before - frame)   norm, state: sums in that
//   frame.
#pragma once

#include "cuda/attention.cuh"

namespace latte::cuda {

// A kernel of elements E with these contents, of kLatents latents and a slice of kDim channels.
template <class E, int kLatents, int kDim, int kContents>
struct KernelShape {
  using Element = E;
  using Product = typename ProductOf<E>::type;
  using Factor = typename Product::Factor;
  static constexpr int L = kLatents, D = kDim;
  static constexpr bool kHasKeys = kContents & kKeys, kHasQueries = kContents & kQueries;
  static constexpr bool kHasOutputs = kContents & kOutputs, kHasFactors = kContents & kFactors;
  static constexpr bool kHasState = kContents & kState, kHasSum = kContents & kSum;
  static constexpr bool kHasSlopes = kContents & kSlopes, kRecalls = kContents & kRecalled;
  static constexpr int kLStride = L + kPadding<E>, kDStride = D + kPadding<E>;
  static constexpr int kWeightStride = L + kPadding<Factor>, kStateStride = D + kPadding<Factor>;
  static constexpr SharedBytes kBytes = shared_bytes({sizeof(E), sizeof(Factor)}, L, D, kContents);
};

// The inputs of a chunk.
template <class Shape>
struct Stage {
  using E = typename Shape::Element;
  using Factor = typename Shape::Factor;
  E *q, *k, *v, *dy;
  Factor *r, *product;  // the factors
  bool* used;           // keys that are there
};

template <class Shape>
struct SharedMemory {
  using E = typename Shape::Element;
  using Factor = typename Shape::Factor;
  static constexpr int L = Shape::L;

  unsigned char* base = shared_memory();

  __device__ __forceinline__ Stage<Shape> stage(int i) const {
    unsigned char* p = base + Shape::kBytes.other() + i * Shape::kBytes.stage;
    Stage<Shape> s;
    s.q = reinterpret_cast<E*>(p), p += Shape::kHasQueries * Shape::kBytes.latent_rows;
    s.k = reinterpret_cast<E*>(p), p += Shape::kHasKeys * Shape::kBytes.latent_rows;
    s.v = reinterpret_cast<E*>(p), p += Shape::kHasKeys * Shape::kBytes.channel_rows;
    s.dy = reinterpret_cast<E*>(p), p += Shape::kHasOutputs * Shape::kBytes.channel_rows;
    s.r = reinterpret_cast<Factor*>(p), p += Shape::kHasFactors * Shape::kBytes.factor_rows;
    s.product = reinterpret_cast<Factor*>(p), p += Shape::kHasFactors * Shape::kBytes.factor_rows;
    s.used = reinterpret_cast<bool*>(p);
    return s;
  }
  __device__ __forceinline__ Factor* weights(const Stage<Shape>& s) const {
    if constexpr (Shape::kBytes.weights == 0) return reinterpret_cast<Factor*>(s.k);
    return reinterpret_cast<Factor*>(base);
  }
  // Factors of a sum.
  __device__ __forceinline__ Factor* spread() const {
    return reinterpret_cast<Factor*>(base + Shape::kBytes.weights);
  }
  __device__ __forceinline__ Factor* slopes() const {
    return reinterpret_cast<Factor*>(base + Shape::kBytes.weights + Shape::kBytes.spread);
  }
  __device__ __forceinline__ Factor* state() const {
    return reinterpret_cast<Factor*>(base + Shape::kBytes.weights + Shape::kBytes.spread +
                                     Shape::kBytes.slopes);
  }
  // Per latent.
  __device__ __forceinline__ float* maximum() const {
    return reinterpret_cast<float*>(base + Shape::kBytes.other() - Shape::kBytes.books);
  }
  __device__ __forceinline__ float* norm() const { return maximum() + L; }
  __device__ __forceinline__ float* frame() const { return maximum() + 2 * L; }
  __device__ __forceinline__ float* decay() const { return maximum() + 3 * L; }
  // Per warp and latent.
  __device__ __forceinline__ float* largest() const { return maximum() + 4 * L; }
  __device__ __forceinline__ float* smallest() const { return maximum() + 8 * L; }
  // Per warp and channel.
  __device__ __forceinline__ float* row_sums() const { return maximum() + 12 * L; }
  // How a chunk counts in a sum, or the norm before it, per latent.
  __device__ __forceinline__ float* share() const { return row_sums() + 4 * Shape::D; }
};

// The rows of a chunk's keys and values.
template <class Shape>
__device__ __forceinline__ void load_keys(const Stage<Shape>& s, const Slice& k, const Slice& v,
                                          int64_t t, const AttentionArgs& a, const Work& w) {
  using E = typename Shape::Element;
  const auto is_used = [&](int row) { return is_key(a, w, t + row); };
  load_rows<E, Shape::L>(s.k, k, t, is_used);
  load_rows<E, Shape::D>(s.v, v, t, is_used);
  if (threadIdx.x < kChunk) s.used[threadIdx.x] = is_used(threadIdx.x);
}

// One key as it counts: -inf if there is none.
template <class Shape>
__device__ __forceinline__ float key_at(const Stage<Shape>& s, int row, int l, const Logits& a) {
  const float k = a.scale * to_compute(s.k[row * Shape::kLStride + l]);
  return s.used[row] && l < a.latents ? k : -kInfinity;
}

// Threads cover a chunk's keys as rows of 8 columns each.
template <class Shape>
struct KeyColumns {
  static constexpr int kGroups = Shape::L / 8;
  static constexpr int kRows = kChunk * kGroups / kAttentionThreads;
  int column = static_cast<int>(threadIdx.x) % kGroups * 8;
  int row = static_cast<int>(threadIdx.x) / kGroups * kRows;

  __device__ __forceinline__ void load(const Stage<Shape>& s, int i, const Logits& a,
                                       float (&k)[8]) const {
    using E = typename Shape::Element;
    constexpr int kPer = 16 / sizeof(E);
#pragma unroll
    for (int part = 0; part < 8; part += kPer) {
      const auto v = *reinterpret_cast<const Vector<E, kPer>*>(s.k + (row + i) * Shape::kLStride +
                                                               column + part);
#pragma unroll
      for (int j = 0; j < kPer; ++j) k[part + j] = to_compute(v.values[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j)
      k[j] = s.used[row + i] && column + j < a.latents ? a.scale * k[j] : -kInfinity;
  }
  // Over the warp's rows into to[warp][latent].
  template <class F>
  __device__ __forceinline__ void reduce(float (&x)[8], float* to, F combine) const {
#pragma unroll
    for (int lanes = kGroups; lanes < 32; lanes *= 2)
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = combine(x[j], __shfl_xor_sync(~0u, x[j], lanes));
    if (lane_id() < kGroups)
#pragma unroll
      for (int j = 0; j < 8; ++j) to[warp_id() * Shape::L + column + j] = x[j];
  }
};

// Calls f(l) for the latents that this thread keeps the books of.
template <class Shape, class F>
__device__ __forceinline__ void for_own_latents(F f) {
  for (int l = threadIdx.x; l < Shape::L; l += kAttentionThreads) f(l);
}

// Extremes of the chunk's finite keys per warp. A barrier has to follow.
template <class Shape>
__device__ __forceinline__ void find_extremes(const SharedMemory<Shape>& m, const Stage<Shape>& s,
                                              const Logits& a) {
  const KeyColumns<Shape> columns;
  float high[8], low[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) high[j] = -kInfinity, low[j] = kInfinity;
#pragma unroll 4
  for (int i = 0; i < columns.kRows; ++i) {
    float k[8];
    columns.load(s, i, a, k);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      high[j] = fmaxf(high[j], k[j]);
      low[j] = fminf(low[j], k[j] == -kInfinity ? kInfinity : k[j]);
    }
  }
  columns.reduce(high, m.largest(), [](float x, float y) { return fmaxf(x, y); });
  columns.reduce(low, m.smallest(), [](float x, float y) { return fminf(x, y); });
}

// Frames and decays of the own latents. True if the normaliser of some row may be below e^-60 in
// the frame: the lowest running maximum is that of the first row, or where that is still empty, not
// below the smallest key.
template <class Shape>
__device__ __forceinline__ bool choose_frames(const SharedMemory<Shape>& m, const Stage<Shape>& s,
                                              const Logits& a) {
  bool is_wide = false;
  for_own_latents<Shape>([&](int l) {
    const float before = m.maximum()[l], first = fmaxf(before, key_at(s, 0, l, a));
    float after = before, low = kInfinity;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      after = fmaxf(after, m.largest()[w * Shape::L + l]);
      low = fminf(low, m.smallest()[w * Shape::L + l]);
    }
    m.frame()[l] = after;
    m.decay()[l] = expf(before - reference_of(after));
    is_wide |= after - (first > -kInfinity ? first : low) > kMaxRange;
  });
  return is_wide;
}

// Keys become weights; their sums per warp. A barrier has to follow.
template <class Shape>
__device__ __forceinline__ void find_weights(const SharedMemory<Shape>& m, const Stage<Shape>& s,
                                             const Logits& a) {
  using Product = typename Shape::Product;
  using Factor = typename Shape::Factor;
  constexpr int kPer = 16 / sizeof(Factor);
  const KeyColumns<Shape> columns;
  float frame[8], sum[8] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) frame[j] = reference_of(m.frame()[columns.column + j]);
#pragma unroll 4
  for (int i = 0; i < columns.kRows; ++i) {
    float w[8];
    columns.load(s, i, a, w);
#pragma unroll
    for (int part = 0; part < 8; part += kPer) {
      Vector<Factor, kPer> out;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        // The sums are those of the rounded weights: what a row divides by is what it adds.
        const float x = Product::rounded(weight<Product>(w[part + j] - frame[part + j]));
        sum[part + j] += x;
        out.values[j] = from_compute<Factor>(x);
      }
      *reinterpret_cast<Vector<Factor, kPer>*>(
          m.weights(s) + (columns.row + i) * Shape::kWeightStride + columns.column + part) = out;
    }
  }
  columns.reduce(sum, m.largest(), [](float x, float y) { return x + y; });
}

// The normalisers of a warp's 16 rows from row `row` on, of latents 16 i and on: `norm` before
// the chunk, sums of the weights of the warps before, and as a product with a triangle of ones the
// own weights up to each row, which leaves them where rows need them.
template <class Shape>
__device__ __forceinline__ Tile find_normalisers(const SharedMemory<Shape>& m,
                                                 const Stage<Shape>& s, const float* norm, int row,
                                                 int i) {
  using Product = typename Shape::Product;
  Tile z, triangle;
  for_each_element(z, [&](int, int l, float& x) { x = norm[16 * i + l]; });
#pragma unroll 1
  for (int w = 0; w < row / 16; ++w)
    for_each_element(z, [&](int, int l, float& x) { x += m.largest()[w * Shape::L + 16 * i + l]; });
  for_each_element(triangle, [](int t, int key, float& x) { x = key <= t; });
  Product::multiply(z, Product::left(triangle),
                    Product::right_rows(m.weights(s) + row * Shape::kWeightStride + 16 * i,
                                        Shape::kWeightStride));
  return z;
}

// Norm and maximum move to the frame, without the chunk.
template <class Shape>
__device__ __forceinline__ void enter_frame(const SharedMemory<Shape>& m) {
  for_own_latents<Shape>([&](int l) {
    m.norm()[l] *= m.decay()[l];
    m.maximum()[l] = m.frame()[l];
  });
}

// One row alone, exact whatever the range of the keys: its decay and, in the place of the frame,
// its weight. A barrier has to follow.
template <class Shape>
__device__ __forceinline__ void step_row(const SharedMemory<Shape>& m, const Stage<Shape>& s,
                                         int row, const Logits& a) {
  for_own_latents<Shape>([&](int l) {
    const float k = key_at(s, row, l, a), before = m.maximum()[l], after = fmaxf(before, k);
    const float decay = expf(before - reference_of(after)), w = expf(k - reference_of(after));
    m.maximum()[l] = after;
    m.norm()[l] = m.norm()[l] * decay + w;
    m.decay()[l] = decay, m.frame()[l] = w;
  });
}

// After the last use of the norm before the chunk.
template <class Shape>
__device__ __forceinline__ void add_sums(const SharedMemory<Shape>& m) {
  for_own_latents<Shape>([&](int l) {
#pragma unroll
    for (int w = 0; w < 4; ++w) m.norm()[l] += m.largest()[w * Shape::L + l];
  });
}

}  // namespace latte::cuda
