// SPDX-License-Identifier: Apache-2.0
// dS and dZ between the walks: from the gradient of the final state and what the queries of each
// part left, to what is behind every part; and from the first keys to the gradient of the initial
// state.
#pragma once

#include "cuda/gradient.cuh"

namespace latte::cuda {

struct GradientFoldArgs {
  StateView before;     // the parts, causal
  StateView final;      // with d_mean
  View d_norm, d_mean;  // of the final state, optional
  GradientView parts;   // in: of their queries; causal, out: behind them
  GradientView total;   // else: of the whole sequence
  int heads = 0, kv_heads = 0, latents = 0, dim = 0, slices = 1;
  int count = 1;  // parts of a sequence
  bool causal = true;
};

inline constexpr int kGradientThreads = 128;

// A block per sequence, query head and latent, a thread for every kGradientThreads-th channel.
class GradientFold {
 public:
  __device__ __forceinline__ explicit GradientFold(const GradientFoldArgs& a) : a_(a) {
    int64_t block = blockIdx.x;
    l_ = static_cast<int>(block % a.latents), block /= a.latents;
    h_ = static_cast<int>(block % a.heads), n_ = block / a.heads;
    kv_ = h_ / (a.heads / a.kv_heads);
  }

  __device__ __forceinline__ void run() {
    if (a_.d_mean.data && h_ % (a_.heads / a_.kv_heads) == 0) seed();
    for (int part = a_.count - 1; part >= 0; --part) {
      const int64_t number = n_ * a_.count + part;
      // In front of the first part nothing is left to be done.
      if (a_.causal && part == 0) return write(a_.parts, number);
      GradientFold own(*this);
      own.read(number);
      if (a_.causal) write(a_.parts, number);
      const float decay = a_.causal ? decay_of(part) : 1;
      norm_ = norm_ * decay + own.norm_;
      for_channels([&](int i, int) { sum_[i] = sum_[i] * decay + own.sum_[i]; });
    }
    write(a_.total, n_);
  }

 private:
  static constexpr int kChannels = static_cast<int>(kMaxDim) / kGradientThreads;

  template <class F>
  __device__ __forceinline__ void for_channels(F f) const {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int d = static_cast<int>(threadIdx.x) + i * kGradientThreads;
      if (d < a_.dim) f(i, d);
    }
  }

  // With mean = S / Z: dS = d_mean / Z and dZ = d_norm - d_mean . mean / Z.
  __device__ __forceinline__ void seed() {
    const float norm = *a_.final.norm.at<float>(n_, kv_, l_);
    float dot = 0;
    if (norm > 0)
      for_channels([&](int i, int d) {
        sum_[i] = *a_.d_mean.at<float>(n_, kv_, l_, d) / norm;
        dot += sum_[i] * *a_.final.mean.at<float>(n_, kv_, l_, d);
      });
    dot = sum_block(dot);
    if (norm > 0) norm_ = *a_.d_norm.at<float>(n_, kv_, l_) - dot;
  }
  __device__ __forceinline__ static float sum_block(float x) {
    auto* const sums = reinterpret_cast<float*>(shared_memory());
    x = across_warp(x, [](float a, float b) { return a + b; });
    if (lane_id() == 0) sums[warp_id()] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < kGradientThreads / 32; ++i) x += sums[i];
    return x;
  }

  // From the frame behind a part to that before it. Nothing is behind the last one without a seed.
  __device__ __forceinline__ float decay_of(int part) const {
    const bool last = part == a_.count - 1;
    if (last && !a_.d_mean.data) return 0;
    const int64_t number = n_ * a_.count + part;
    const float behind =
        last ? *a_.final.max.at<float>(n_, kv_, l_) : *a_.before.max.at<float>(number + 1, kv_, l_);
    return expf(*a_.before.max.at<float>(number, kv_, l_) - reference_of(behind));
  }

  // Every thread has read before one writes.
  __device__ __forceinline__ void read(int64_t number) {
    norm_ = 0;
    for (int slice = 0; slice < a_.slices; ++slice)
      norm_ += *a_.parts.norm.at<float>(number, h_, slice, l_);
    for_channels([&](int i, int d) { sum_[i] = *a_.parts.sum.at<float>(number, h_, l_, d); });
    __syncthreads();
  }
  __device__ __forceinline__ void write(const GradientView& to, int64_t number) const {
    if (threadIdx.x == 0) *to.norm.at<float>(number, h_, 0, l_) = norm_;
    for_channels([&](int i, int d) { *to.sum.at<float>(number, h_, l_, d) = sum_[i]; });
  }

  const GradientFoldArgs& a_;
  int64_t n_;
  int h_, kv_, l_;
  float norm_ = 0, sum_[kChannels] = {};
};

inline constexpr int kFoldShared = kGradientThreads / 32 * sizeof(float);

__global__ void __launch_bounds__(kGradientThreads)
    fold_gradients(const __grid_constant__ GradientFoldArgs a) {
  GradientFold(a).run();
}

struct InitialGradientArgs {
  GradientView front;
  StateView initial;
  View d_norm, d_mean;  // of the initial state
  int heads = 0, kv_heads = 0, latents = 0, dim = 0, slices = 1;
};

// The initial state is S = norm mean and Z = norm in the frame of its maximum:
//   d_mean = norm dS     d_norm = dZ + mean . dS
// A warp per sequence, head of keys and latent.
__global__ void __launch_bounds__(kGradientThreads)
    initial_gradient(const __grid_constant__ InitialGradientArgs a, int64_t count) {
  int64_t row = static_cast<int64_t>(blockIdx.x) * (kGradientThreads / 32) + warp_id();
  if (row >= count) return;
  const int l = static_cast<int>(row % a.latents);
  row /= a.latents;
  const int kv = static_cast<int>(row % a.kv_heads), group = a.heads / a.kv_heads;
  const int64_t n = row / a.kv_heads;
  const float norm = *a.initial.norm.at<float>(n, kv, l);
  const bool empty = norm == 0 || *a.initial.max.at<float>(n, kv, l) == -kInfinity;
  float d_norm = 0;
  for (int d = lane_id(); d < a.dim; d += 32) {
    float sum = 0;
    for (int h = kv * group; h < (kv + 1) * group && !empty; ++h)
      sum += *a.front.sum.at<float>(n, h, l, d);
    *a.d_mean.at<float>(n, kv, l, d) = norm * sum;
    if (!empty) d_norm += *a.initial.mean.at<float>(n, kv, l, d) * sum;
  }
  d_norm = across_warp(d_norm, [](float x, float y) { return x + y; });
  for (int h = kv * group; h < (kv + 1) * group && !empty; ++h)
    for (int slice = 0; slice < a.slices; ++slice)
      d_norm += *a.front.norm.at<float>(n, h, slice, l);
  if (lane_id() == 0) *a.d_norm.at<float>(n, kv, l) = d_norm;
}

}  // namespace latte::cuda
