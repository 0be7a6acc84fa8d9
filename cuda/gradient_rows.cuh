// SPDX-License-Identifier: Apache-2.0
// Row by row around the walks where they cut L or D, or where heads share keys: the softmax of q
// before them, and sums of their partial results after.
#pragma once

#include "cuda/gradient.cuh"

namespace latte::cuda {

inline constexpr int kRowThreads = 128;

// (B,H,T) rows, a warp for each.
struct RowArgs {
  HeadRows q, dq;
  const float* partial = nullptr;  // p dp as (B,H,count,T,L)
  View softmax;                    // (B,H,T,2)
  View d_log_sum;                  // optional (B,H,T)
  int64_t heads = 0, tokens = 0, rows = 0;
  int latents = 0, count = 1;
  float scale = 1;
};

struct Row {
  int64_t number, b, h, t;

  __device__ __forceinline__ explicit Row(const RowArgs& a)
      : number(static_cast<int64_t>(blockIdx.x) * (kRowThreads / 32) + warp_id()),
        b(number / a.tokens / a.heads),
        h(number / a.tokens % a.heads),
        t(number % a.tokens) {}
};

__device__ __forceinline__ float read_logit(const RowArgs& a, const Row& row, int l) {
  float q = 0;
  with_storage_type<float>(a.q.dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    q = to_compute(global_load(static_cast<const S*>(a.q.data) + row.b * a.q.stride_b +
                               row.h * a.q.stride_h + row.t * a.q.stride_t + l * a.q.stride_c));
  });
  return a.scale * q;
}

__global__ void __launch_bounds__(kRowThreads) query_softmax(const __grid_constant__ RowArgs a) {
  const Row row(a);
  if (row.number >= a.rows) return;
  const RowSoftmax p = row_softmax(a.latents, [&](int l) { return read_logit(a, row, l); });
  if (lane_id() != 0) return;
  float* const to = a.softmax.at<float>(row.b, row.h, row.t);
  global_store(to, p.high), global_store(to + 1, p.inverse_sum);
}

// dq = scale p (dp - <p, dp> + d_log_sum) from sums of p dp.
__global__ void __launch_bounds__(kRowThreads) finish_queries(const __grid_constant__ RowArgs a) {
  constexpr int kPer = static_cast<int>(kMaxLatents) / 32;
  const Row row(a);
  if (row.number >= a.rows) return;
  const RowSoftmax p = row_softmax(a.latents, [&](int l) { return read_logit(a, row, l); });
  const int64_t plane = a.tokens * a.latents;
  const float* const from =
      a.partial + (row.b * a.heads + row.h) * a.count * plane + row.t * a.latents;
  float products[kPer] = {}, along = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int l = lane_id() + 32 * i;
    if (l >= a.latents) continue;
    for (int j = 0; j < a.count; ++j) products[i] += global_load(from + j * plane + l);
    along += products[i];
  }
  along = across_warp(along, [](float x, float y) { return x + y; });
  if (a.d_log_sum.data) along -= global_load(a.d_log_sum.at<float>(row.b, row.h, row.t));
  with_storage_type<float>(a.dq.dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    S* const to = static_cast<S*>(a.dq.data) + row.b * a.dq.stride_b + row.h * a.dq.stride_h +
                  row.t * a.dq.stride_t;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int l = lane_id() + 32 * i;
      if (l >= a.latents) continue;
      const float dq = products[i] - p(read_logit(a, row, l)) * along;
      global_store(to + l * a.dq.stride_c, from_compute<S>(a.scale * dq));
    }
  });
}

// A (B,heads,T,C) tensor from partial sums (B,heads,count,T,C), a thread per element.
struct PartialSumArgs {
  HeadRows to;
  const float* partial = nullptr;
  int64_t heads = 0, tokens = 0, channels = 0, elements = 0;
  int count = 1;
};

__global__ void __launch_bounds__(kRowThreads)
    sum_partials(const __grid_constant__ PartialSumArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= a.elements) return;
  const int64_t c = i % a.channels, t = i / a.channels % a.tokens;
  const int64_t head = i / a.channels / a.tokens, plane = a.tokens * a.channels;
  const float* const from = a.partial + head * a.count * plane + t * a.channels + c;
  float sum = 0;
  for (int j = 0; j < a.count; ++j) sum += global_load(from + j * plane);
  with_storage_type<float>(a.to.dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    global_store(static_cast<S*>(a.to.data) + head / a.heads * a.to.stride_b +
                     head % a.heads * a.to.stride_h + t * a.to.stride_t + c * a.to.stride_c,
                 from_compute<S>(sum));
  });
}

}  // namespace latte::cuda
