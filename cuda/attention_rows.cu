// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention.cuh"
#include "cuda/attention_rows.h"

namespace latte::cuda {
namespace {

constexpr int kRowThreads = 128;

struct Row {
  int64_t number, b, h, t;

  __device__ __forceinline__ explicit Row(const RowArgs& a)
      : number(static_cast<int64_t>(blockIdx.x) * (kRowThreads / 32) + warp_id()),
        b(number / a.tokens / a.heads),
        h(number / a.tokens % a.heads),
        t(number % a.tokens) {}
};

__device__ __forceinline__ float read_logit(const RowArgs& a, const Row& row, int l) {
  return a.scale * read<float>(a.q, row.b, row.h, row.t, l);
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

}  // namespace

void launch_query_softmax(const char* op, const RowArgs& args, void* stream) {
  launch_blocks(op, query_softmax, ceil_div(args.rows, kRowThreads / 32), kRowThreads, 0, stream,
                args);
}
void launch_finish_queries(const char* op, const RowArgs& args, void* stream) {
  launch_blocks(op, finish_queries, ceil_div(args.rows, kRowThreads / 32), kRowThreads, 0, stream,
                args);
}
void launch_partial_sums(const char* op, const PartialSumArgs& args, void* stream) {
  launch_blocks(op, sum_partials, ceil_div(args.elements, kRowThreads), kRowThreads, 0, stream,
                args);
}

}  // namespace latte::cuda
