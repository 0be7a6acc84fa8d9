// SPDX-License-Identifier: Apache-2.0
// Row by row around the walks where they cut L or D, or where heads share keys: the softmax of q
// before them, and sums of their partial results after.
#pragma once

#include "cuda/head_rows.cuh"
#include "cuda/state.cuh"

namespace latte::cuda {

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

// A (B,heads,T,C) tensor from partial sums (B,heads,count,T,C), a thread per element.
struct PartialSumArgs {
  HeadRows to;
  const float* partial = nullptr;
  int64_t heads = 0, tokens = 0, channels = 0, elements = 0;
  int count = 1;
};

// Maximum and 1 / sum of every row of q.
void launch_query_softmax(const char* op, const RowArgs& args, void* stream);
// dq from sums of p dp.
void launch_finish_queries(const char* op, const RowArgs& args, void* stream);
void launch_partial_sums(const char* op, const PartialSumArgs& args, void* stream);

// Dense float32 rows (B,heads,count,T,C).
inline HeadRows partial_rows(float* data, int64_t heads, int64_t tokens, int64_t channels,
                             int64_t count) {
  const int64_t plane = tokens * channels, head = count * plane;
  HeadRows out{data, DType::float32};
  out.stride_b = heads * head, out.stride_h = head;
  out.stride_t = channels, out.stride_c = 1;
  out.vectors = channels % 4 == 0, out.stride_partial = plane;
  return out;
}

// Partial sums of a tensor, of which there may be one: the tensor itself.
struct Partials {
  float* data = nullptr;
  int count = 1;

  void place(Workspace& workspace, int64_t count_of_each, int64_t elements) {
    count = static_cast<int>(count_of_each);
    if (count > 1) data = workspace.take<float>(elements * count);
  }
  void sum(const char* op, const Tensor& to, void* stream) const {
    if (count == 1) return;
    PartialSumArgs a;
    a.to = head_rows(to, false), a.partial = data, a.count = count;
    a.heads = to.shape[1], a.tokens = to.shape[2], a.channels = to.shape[3];
    a.elements = to.shape[0] * a.heads * a.tokens * a.channels;
    launch_partial_sums(op, a, stream);
  }
};

// Two numbers per row of q.
inline View take_softmax(Workspace& workspace, int64_t batch, int64_t heads, int64_t tokens) {
  return {workspace.take<float>(2 * batch * heads * tokens),
          {2 * heads * tokens, 2 * tokens, 2, 1}};
}

}  // namespace latte::cuda
