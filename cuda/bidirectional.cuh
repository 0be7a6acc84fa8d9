// SPDX-License-Identifier: Apache-2.0
// Bidirectional latent attention after the summary of all keys: y = softmax(q) mean.
#pragma once

#include "cuda/queries.cuh"

namespace latte::cuda {

// `a.initial` is the summary.
template <class Shape>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    bidirectional_forward(const __grid_constant__ AttentionArgs a) {
  using E = typename Shape::Element;
  using Product = typename Shape::Product;
  const Work w = find_work<Shape>(a, a.heads);
  const SharedMemory<Shape> m;
  const Slice q = slice_of(a.q, w, w.head, w.latent, a.latents);
  const Target y(slice_of(a.y, w, w.head, w.channel, a.dim, w.latent / Shape::L));
  const auto load = [&](int64_t chunk) {
    const int64_t t = chunk * kChunk;
    load_rows<E, Shape::L>(m.stage(stage_of(chunk, a.stages)).q, q, t,
                           [&](int row) { return t + row < w.tokens; });
    async_copy_commit();
  };

  const int64_t chunks = ceil_div(w.tokens, kChunk);
  if (chunks > 0) load(0);
  for (int i = threadIdx.x; i < Shape::L * Shape::D; i += kAttentionThreads) {
    const int l = i / Shape::D, d = i % Shape::D;
    const int latent = w.latent + l, channel = w.channel + d;
    const bool there = latent < a.latents && channel < a.dim;
    const float mean =
        there ? *a.initial.mean.at<float>(w.sequence, w.kv_head, latent, channel) : 0;
    m.state()[l * Shape::kStateStride + d] =
        from_compute<typename Shape::Factor>(Product::rounded(mean));
  }
  walk_chunks(chunks, a.stages, load, [&](int64_t c) {
    const Stage<Shape> s = m.stage(stage_of(c, a.stages));
    QueryRows<Shape>(m, s, a, w, c * kChunk).write(y);
    __syncthreads();
  });
}

}  // namespace latte::cuda
