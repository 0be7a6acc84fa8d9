// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention.cuh"
#include "cuda/segments.h"

namespace latte::cuda {

inline constexpr int kFoldThreads = 128;

// A block per sequence, head and latent; all of its threads read a summary before one overwrites
// it.
__global__ void __launch_bounds__(kFoldThreads) fold_parts(const __grid_constant__ FoldArgs a) {
  constexpr int kChannels = static_cast<int>(kMaxDim) / kFoldThreads;
  int64_t block = blockIdx.x;
  const int l = static_cast<int>(block % a.latents);
  block /= a.latents;
  const int h = static_cast<int>(block % a.kv_heads);
  const int64_t n = block / a.kv_heads;

  float max = -kInfinity, norm = 0, mean[kChannels] = {};
  const auto channels = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int d = static_cast<int>(threadIdx.x) + i * kFoldThreads;
      if (d < a.dim) f(i, d);
    }
  };
  const auto write = [&](const StateView& to, int64_t number) {
    if (threadIdx.x == 0)
      *to.max.at<float>(number, h, l) = max, *to.norm.at<float>(number, h, l) = norm;
    channels([&](int i, int d) { *to.mean.at<float>(number, h, l, d) = mean[i]; });
  };

  if (a.initial.present()) {
    max = *a.initial.max.at<float>(n, h, l), norm = *a.initial.norm.at<float>(n, h, l);
    channels([&](int i, int d) { mean[i] = *a.initial.mean.at<float>(n, h, l, d); });
  }
  for (int part = 0; part < a.count; ++part) {
    const int64_t number = n * a.stride + part;
    const Merged<float> merged(max, norm, *a.parts.max.at<float>(number, h, l),
                               *a.parts.norm.at<float>(number, h, l));
    float part_mean[kChannels];
    channels([&](int i, int d) { part_mean[i] = *a.parts.mean.at<float>(number, h, l, d); });
    if (a.writes_prefixes) {
      __syncthreads();
      write(a.parts, number);
    }
    max = merged.max, norm = merged.norm;
    channels([&](int i, int) { mean[i] += merged.share * (part_mean[i] - mean[i]); });
  }
  if (a.writes_prefixes) write(a.parts, n * a.stride + a.count);
  if (a.total.present()) write(a.total, n);
}

void launch_fold(const char* op, const FoldArgs& args, int64_t rows, void* stream) {
  launch_blocks(op, fold_parts, rows, kFoldThreads, 0, stream, args);
}

}  // namespace latte::cuda
