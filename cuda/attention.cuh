// SPDX-License-Identifier: Apache-2.0
// What the kernels of latent attention share: their arguments, and the way of rows from global to
// shared memory and back.
#pragma once

#include "cuda/attention_plan.h"
#include "cuda/head_rows.cuh"
#include "cuda/rows.cuh"
#include "cuda/state.cuh"
#include "cuda/tile.cuh"

namespace latte::cuda {

// How logits count: times a scale, and so many of a block's latents.
struct Logits {
  float scale;
  int latents;
};

struct AttentionArgs {
  HeadRows q, k, v, y;
  const bool* key_mask = nullptr;
  int64_t mask_stride_b = 0, mask_stride_t = 0;
  Sequences sequences;
  int heads = 0, kv_heads = 0, latents = 0, dim = 0;
  float scale = 1;
  // The tokens of a sequence are cut into `parts`, of which the first `walked` have blocks. Where
  // every part has a state, that of part i of sequence n is number n parts + i.
  int parts = 1, walked = 1, slices = 1, latent_slices = 1;
  int stages = 1;
  View softmax;  // (B,H,T,2), of q's rows: maximum and 1 / sum; absent where L is one slice
  StateView initial, final;
  bool initial_of_part = false, final_of_part = false;
};

// What a block works on: a head, a slice of D and of L, and some tokens of a sequence.
struct Work {
  int64_t sequence, batch, first, tokens;
  int head, kv_head, part, channel, slice, latent;
};

// `heads` are those of the queries, or of the keys for a kernel that has no queries.
template <class Shape>
__device__ __forceinline__ Work find_work(const AttentionArgs& a, int heads) {
  int64_t block = blockIdx.x;
  Work w;
  w.slice = static_cast<int>(block % a.slices), block /= a.slices;
  w.channel = w.slice * Shape::D;
  w.latent = static_cast<int>(block % a.latent_slices) * Shape::L, block /= a.latent_slices;
  w.part = static_cast<int>(block % a.walked), block /= a.walked;
  w.head = static_cast<int>(block % heads), w.sequence = block / heads;
  w.kv_head = w.head / (heads / a.kv_heads);
  const Range range = a.sequences.range(w.sequence);
  const int64_t size = round_up(ceil_div(range.tokens, a.parts), kChunk);
  const int64_t begin = least(w.part * size, range.tokens);
  w.batch = range.batch, w.first = range.first + begin;
  w.tokens = least(size, range.tokens - begin);
  return w;
}

__device__ __forceinline__ Logits logits_of(const AttentionArgs& a, const Work& w) {
  return {a.scale, a.latents - w.latent};
}
__device__ __forceinline__ bool is_key(const AttentionArgs& a, const Work& w, int64_t t) {
  return t < w.tokens &&
         (!a.key_mask || a.key_mask[w.batch * a.mask_stride_b + (w.first + t) * a.mask_stride_t]);
}
// Of a state in front of a part or behind it.
__device__ __forceinline__ int64_t state_number(const AttentionArgs& a, const Work& w,
                                                bool of_part) {
  return of_part ? w.sequence * a.parts + w.part : w.sequence;
}

// Rows of one head, from a token and a channel on. What is the same for all blocks stays in the
// constant memory of the arguments: registers are short.
struct Slice {
  const HeadRows& rows;
  int64_t first;  // element
  int width;      // channels from there on
};
__device__ __forceinline__ Slice slice_of(const HeadRows& rows, const Work& w, int head,
                                          int channel, int channels, int partial = 0) {
  return {rows,
          w.batch * rows.stride_b + head * rows.stride_h + w.first * rows.stride_t +
              channel * rows.stride_c + partial * rows.stride_partial,
          channels - channel};
}

template <class E>
inline constexpr int kPadding = kRowPadding / sizeof(E);

// The rows [t, t + kRows) of kWidth channels into shared memory, zeros where there is nothing or
// `is_used(row)` is false. Vectors arrive asynchronously.
template <class E, int kWidth, int kRows = kChunk, class Used>
__device__ __forceinline__ void load_rows(E* to, const Slice& from, int64_t t, Used is_used) {
  constexpr int kStride = kWidth + kPadding<E>;
  const int64_t stride_t = from.rows.stride_t;
  // A thread keeps its columns. Not unrolled: the addresses of every step would be kept in
  // registers from chunk to chunk.
  if (from.rows.vectors) {
    constexpr int kPer = 16 / sizeof(E), kVectors = kWidth / kPer;
    constexpr int kStep = kAttentionThreads / kVectors;
    const int c = static_cast<int>(threadIdx.x) % kVectors * kPer;
    const E* const data = static_cast<const E*>(from.rows.data) + from.first;
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x) / kVectors; row < kRows; row += kStep) {
      const bool valid = c < from.width && is_used(row);
      async_copy_16(to + row * kStride + c, valid ? data + (t + row) * stride_t + c : data, valid);
    }
    return;
  }
  with_storage_type<float>(from.rows.dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    const S* const data = static_cast<const S*>(from.rows.data) + from.first;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kWidth; i += kAttentionThreads) {
      const int row = i / kWidth, c = i % kWidth;
      const bool valid = c < from.width && is_used(row);
      const S* const at = data + (t + row) * stride_t + c * from.rows.stride_c;
      to[row * kStride + c] = from_compute<E>(valid ? to_compute(global_load(at)) : 0.0f);
    }
  });
}

// Of chunk i, with one stage or two.
__device__ __forceinline__ int stage_of(int64_t i, int stages) {
  return static_cast<int>(i) & (stages - 1);
}

// Walks chunks whose rows load(chunk) asks for; with two stages the next chunk is on its way while
// one is walked. The first has been asked for.
template <class Load, class Walk>
__device__ __forceinline__ void walk_chunks(int64_t chunks, int stages, Load load, Walk walk) {
  for (int64_t c = 0; c < chunks; ++c) {
    if (stages == 2 && c + 1 < chunks) {
      load(c + 1);
      async_copy_wait<1>();
    } else {
      async_copy_wait<0>();
    }
    __syncthreads();
    walk(c);
    if (stages == 1 && c + 1 < chunks) load(c + 1);
  }
}

// Rows of y.
struct Target : Slice {
  __device__ __forceinline__ explicit Target(const Slice& slice) : Slice(slice) {}

  __device__ __forceinline__ void store(int64_t t, int c, float value) const {
    if (c >= width) return;
    with_storage_type<float>(rows.dtype, [&](auto type) {
      using S = typename decltype(type)::type;
      global_store(static_cast<S*>(rows.data) + first + t * rows.stride_t + c * rows.stride_c,
                   from_compute<S>(value));
    });
  }
  // The first `count` rows of a tile at row t and channel c. Whole sectors of 32 bytes leave a
  // warp: pairs of float32 fill them, of halves only after lanes have exchanged theirs.
  __device__ __forceinline__ void store_tile(int64_t t, int c, int64_t count,
                                             const Tile& tile) const {
    if (!rows.vectors) {
      store_elements(t, c, count, tile);
    } else {
      with_storage_type<float>(rows.dtype, [&](auto type) {
        store_vectors<typename decltype(type)::type>(t, c, count, tile);
      });
    }
  }
  // The same where vectors of S are known to fit.
  template <class S>
  __device__ __forceinline__ void store_vectors(int64_t t, int c, int64_t count,
                                                const Tile& tile) const {
    if constexpr (sizeof(S) == 4) {
      store_pairs(t, c, count, tile);
    } else {
      store_halves<S>(t, c, count, tile);
    }
  }

 private:
  __device__ __forceinline__ void store_elements(int64_t t, int c, int64_t count,
                                                 const Tile& tile) const {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (tile_row(e % 4) < count)
        store(t + tile_row(e % 4), c + tile_column(e / 4, e % 4), tile.c[e / 4][e % 4]);
  }
  __device__ __forceinline__ void store_pairs(int64_t t, int c, int64_t count,
                                              const Tile& tile) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int h = i / 2, r = i % 2 * 2, row = tile_row(r), column = c + tile_column(h, 0);
      if (row < count && column < width) {
        float* const at =
            static_cast<float*>(rows.data) + first + (t + row) * rows.stride_t + column;
        global_store(reinterpret_cast<float2*>(at), make_float2(tile.c[h][r], tile.c[h][r + 1]));
      }
    }
  }
  // An even lane keeps its pair of the left half and receives its neighbour's, the odd one of the
  // right half: four neighbouring columns each.
  template <class S>
  __device__ __forceinline__ void store_halves(int64_t t, int c, int64_t count,
                                               const Tile& tile) const {
    const bool odd = lane_id() % 2;
    const int column = c + (odd ? 8 : 0) + lane_id() % 4 / 2 * 4;
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
      const uint32_t left = pack<S>(tile.c[0][r], tile.c[0][r + 1]);
      const uint32_t right = pack<S>(tile.c[1][r], tile.c[1][r + 1]);
      const uint32_t other = __shfl_xor_sync(~0u, odd ? left : right, 1);
      if (tile_row(r) < count && column < width) {
        S* const at =
            static_cast<S*>(rows.data) + first + (t + tile_row(r)) * rows.stride_t + column;
        global_store(reinterpret_cast<uint2*>(at),
                     odd ? make_uint2(other, right) : make_uint2(left, other));
      }
    }
  }
};

// exp(x) for x <= 0, as accurate as the products are; 0 for -inf.
template <class Product>
__device__ __forceinline__ float weight(float x) {
  return Product::kExact ? expf(x) : exp2_approx(x * 1.4426950408889634f);
}
template <class Product>
__device__ __forceinline__ float quotient(float a, float b) {
  return Product::kExact ? a / b : __fdividef(a, b);
}

// Over all lanes of a warp.
template <class T, class F>
__device__ __forceinline__ T across_warp(T x, F combine) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) x = combine(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

// Over the four lanes of a tile's row.
template <class F>
__device__ __forceinline__ float across_quad(float x, F combine) {
  x = combine(x, __shfl_xor_sync(~0u, x, 1));
  return combine(x, __shfl_xor_sync(~0u, x, 2));
}

inline constexpr float kInfinity = __builtin_huge_valf();
// A maximum as a reference to subtract: the empty set's is any number.
__device__ __forceinline__ float reference_of(float max) { return max == -kInfinity ? 0 : max; }

// The softmax over latents of one row, by a warp whose lanes take every 32nd of them.
struct RowSoftmax {
  float high, inverse_sum;

  __device__ __forceinline__ float operator()(float logit) const {
    return expf(logit - high) * inverse_sum;
  }
};
template <class F>
__device__ __forceinline__ RowSoftmax row_softmax(int latents, F logit) {
  float high = -kInfinity, sum = 0;
  for (int l = lane_id(); l < latents; l += 32) high = fmaxf(high, logit(l));
  high = reference_of(across_warp(high, [](float x, float y) { return fmaxf(x, y); }));
  for (int l = lane_id(); l < latents; l += 32) sum += expf(logit(l) - high);
  sum = across_warp(sum, [](float x, float y) { return x + y; });
  return {high, sum > 0 ? 1 / sum : 0};
}

// The same of row t of a block's, which has all of the latents, or finds it where L is cut.
template <class F>
__device__ __forceinline__ RowSoftmax row_softmax(const AttentionArgs& a, const Work& w, int64_t t,
                                                  int latents, F logit) {
  if (!a.softmax.data) return row_softmax(latents, logit);
  const float* const row = a.softmax.at<float>(w.batch, w.head, w.first + t);
  return {global_load(row), global_load(row + 1)};
}
// And of the two rows of a lane's tile at row t. Rows that are not there have no weights.
__device__ __forceinline__ void load_softmax(const AttentionArgs& a, const Work& w, int64_t t,
                                             float (&max)[2], float (&inverse_sum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = t + tile_row(2 * r);
    max[r] = inverse_sum[r] = 0;
    if (row >= w.tokens) continue;
    const float* const at = a.softmax.at<float>(w.batch, w.head, w.first + row);
    max[r] = global_load(at), inverse_sum[r] = global_load(at + 1);
  }
}

}  // namespace latte::cuda
