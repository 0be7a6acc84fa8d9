// SPDX-License-Identifier: Apache-2.0
// The state of a block between chunks: sums of weight times value, float32 accumulators of tensor
// cores that never leave registers, and the public form around them.
#pragma once

#include "cuda/keys.cuh"

namespace latte::cuda {

// A warp's part: kHigh tiles of latents by kWide tiles of channels. Few latents leave warps over,
// which share the channels; some may be left idle.
template <class Shape>
struct StateTiles {
  static constexpr int kLatentTiles = Shape::L / 16, kDimTiles = Shape::D / 16;
  static constexpr int kHigh = kLatentTiles > 4 ? kLatentTiles / 4 : 1;
  static constexpr int kAcross = kLatentTiles < 4 ? 4 / kLatentTiles : 1;
  static constexpr int kWide = kAcross < kDimTiles ? kDimTiles / kAcross : 1;

  int latent = warp_id() * kHigh * 16 % Shape::L;
  int channel = warp_id() * kHigh * 16 / Shape::L * kWide * 16;
  Tile sum[kHigh][kWide];

  __device__ __forceinline__ bool is_idle() const { return channel >= Shape::D; }

  // Calls f(latent, channel, sum) for the lane's elements.
  template <class F>
  __device__ __forceinline__ void for_each(F f) {
    if (is_idle()) return;
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int j = 0; j < kWide; ++j)
        for_each_element(sum[i][j], [&](int row, int column, float& x) {
          f(latent + 16 * i + row, channel + 16 * j + column, x);
        });
  }

  // Absent states are empty. A barrier has to follow.
  __device__ __forceinline__ void load(const SharedMemory<Shape>& m, const StateView& from,
                                       const AttentionArgs& a, int64_t n, const Work& w) {
    for_own_latents<Shape>([&](int l) {
      const int latent = w.latent + l;
      const bool there = from.present() && latent < a.latents;
      m.maximum()[l] = there ? *from.max.at<float>(n, w.kv_head, latent) : -kInfinity;
      m.norm()[l] = there ? *from.norm.at<float>(n, w.kv_head, latent) : 0;
    });
    for_each([&](int l, int d, float& x) {
      const int latent = w.latent + l;
      x = 0;
      if (!from.present() || latent >= a.latents || w.channel + d >= a.dim) return;
      const float norm = *from.norm.at<float>(n, w.kv_head, latent);
      if (norm > 0) x = norm * *from.mean.at<float>(n, w.kv_head, latent, w.channel + d);
    });
  }

  // A barrier has to precede.
  __device__ __forceinline__ void store(const SharedMemory<Shape>& m, const StateView& to,
                                        const AttentionArgs& a, int64_t n, const Work& w) {
    if (w.channel == 0)
      for_own_latents<Shape>([&](int l) {
        const int latent = w.latent + l;
        if (latent >= a.latents) return;
        *to.max.at<float>(n, w.kv_head, latent) = m.maximum()[l];
        *to.norm.at<float>(n, w.kv_head, latent) = m.norm()[l];
      });
    for_each([&](int l, int d, float& x) {
      const int latent = w.latent + l;
      if (latent >= a.latents || w.channel + d >= a.dim) return;
      const float norm = m.norm()[l];
      *to.mean.at<float>(n, w.kv_head, latent, w.channel + d) = norm > 0 ? x / norm : 0;
    });
  }

  // Into the frame of the chunk.
  __device__ __forceinline__ void scale(const SharedMemory<Shape>& m) {
    for_each([&](int l, int, float& x) { x *= m.decay()[l]; });
  }

  // As factors of the queries' product. A barrier has to follow.
  __device__ __forceinline__ void share(const SharedMemory<Shape>& m) {
    if (is_idle()) return;
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int j = 0; j < kWide; ++j)
        share_tile<typename Shape::Product>(
            m.state() + (latent + 16 * i) * Shape::kStateStride + channel + 16 * j,
            Shape::kStateStride, sum[i][j]);
  }

  // One row, with the decays and weights of step_row.
  __device__ __forceinline__ void add_row(const SharedMemory<Shape>& m,
                                          const typename Shape::Element* row) {
    for_each(
        [&](int l, int d, float& x) { x = x * m.decay()[l] + m.frame()[l] * to_compute(row[d]); });
  }

  // Sums over the warp's latents of factor(latent) times the state, into sums[channel].
  template <class F>
  __device__ __forceinline__ void sum_latents(F factor, float* sums) const {
    if (is_idle()) return;
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      float part[4] = {};
#pragma unroll
      for (int i = 0; i < kHigh; ++i)
#pragma unroll
        for (int e = 0; e < 8; ++e)
          part[e / 4 * 2 + e % 2] +=
              factor(latent + 16 * i + tile_row(e % 4)) * sum[i][j].c[e / 4][e % 4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) part[e] += __shfl_xor_sync(~0u, part[e], lanes);
        if (lane_id() < 4) sums[channel + 16 * j + tile_column(e / 2, e % 2)] = part[e];
      }
    }
  }

  // Sums over the warp's channels of factor(channel) times the state, into sums[latent] of its part
  // of the channels.
  template <class F>
  __device__ __forceinline__ void sum_channels(F factor, float* sums) const {
    if (is_idle()) return;
    sums += channel / (kWide * 16) * Shape::L;
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < kWide; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            sum += factor(channel + 16 * j + tile_column(e / 2, e % 2)) *
                   this->sum[i][j].c[e / 2][r + e % 2];
        sum = across_quad(sum, [](float x, float y) { return x + y; });
        if (lane_id() % 4 == 0) sums[latent + 16 * i + tile_row(r)] = sum;
      }
  }
  // Parts of the channels that sum_channels leaves sums of.
  static constexpr int kChannelParts = kAcross < kDimTiles ? kAcross : kDimTiles;

  // += weights^T rows of the chunk, (kChunk,L) and (kChunk,D).
  __device__ __forceinline__ void add(const typename Shape::Factor* weights,
                                      const typename Shape::Element* rows) {
    using Product = typename Shape::Product;
    if (is_idle()) return;
#pragma unroll 1
    for (int row = 0; row < kChunk; row += 16) {
      typename Product::Left w[kHigh];
#pragma unroll
      for (int i = 0; i < kHigh; ++i)
        w[i] = Product::left_columns(weights + row * Shape::kWeightStride + latent + 16 * i,
                                     Shape::kWeightStride);
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const auto v =
            Product::right_rows(rows + row * Shape::kDStride + channel + 16 * j, Shape::kDStride);
#pragma unroll
        for (int i = 0; i < kHigh; ++i) Product::multiply(sum[i][j], w[i], v);
      }
    }
  }
};

// A row of sums of all warps, per warp and channel.
template <class Shape>
__device__ __forceinline__ void store_row_sums(const Target& to, int64_t t, const float* sums) {
  constexpr int D = Shape::D;
  for (int d = threadIdx.x; d < D; d += kAttentionThreads)
    to.store(t, d, sums[d] + sums[D + d] + sums[2 * D + d] + sums[3 * D + d]);
}

}  // namespace latte::cuda
