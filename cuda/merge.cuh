// SPDX-License-Identifier: Apache-2.0
// out = a + b. A warp per latent; 2 L D elements read and L D written, each once.
#pragma once

#include "cuda/state.cuh"

namespace latte::cuda {

struct MergeParams {
  StateView a, b, out;
  int64_t heads = 0, latents = 0, dim = 0, rows = 0;  // rows: sequences times heads times latents
};

template <class T, int N>
__global__ void __launch_bounds__(kMergeThreads) merge_states(MergeParams p) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x) / 32;
  if (row >= p.rows) return;
  const int64_t l = row % p.latents, h = row / p.latents % p.heads, n = row / p.latents / p.heads;
  const T a_norm = load_number<T>(p.a.norm, n, h, l);
  const Merged<T> merged(load_number<T>(p.a.max, n, h, l), a_norm, load_number<T>(p.b.max, n, h, l),
                         load_number<T>(p.b.norm, n, h, l));
  // `out` may be `a` or `b`: no lane writes before all have read.
  __syncwarp();
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (lane == 0) {
    store_number(p.out.max, n, h, l, merged.max);
    store_number(p.out.norm, n, h, l, merged.norm);
  }
  for (int64_t d = lane * N; d < p.dim; d += 32 * N) {
    T first[N], second[N];
    load_vector(p.a.mean.template at<T>(n, h, l, d), first);
    load_vector(p.b.mean.template at<T>(n, h, l, d), second);
#pragma unroll
    for (int i = 0; i < N; ++i)
      second[i] = a_norm == 0 ? second[i] : first[i] + merged.share * (second[i] - first[i]);
    store_vector(p.out.mean.template at<T>(n, h, l, d), second);
  }
}

}  // namespace latte::cuda
