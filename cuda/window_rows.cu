// SPDX-License-Identifier: Apache-2.0
// With d = share (<dy, window> - <dy, y>) the gradient of a gate's column 0 is d and that of the
// log of the latents' sum -d: with these both parts go back on their own.
#include "cuda/call.h"
#include "cuda/sum.cuh"
#include "cuda/window_gate.cuh"
#include "cuda/window_rows.h"

namespace latte::cuda {
namespace {

constexpr const char* kOp = "sliding_window_attention_backward";

inline constexpr int kRowGradientThreads = 128;

// A warp per query: delta = <dy, window> - d_log_sum, or share <dy, window> with a gate.
__global__ void __launch_bounds__(kRowGradientThreads)
    window_row_gradient(const __grid_constant__ RowGradientArgs a) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kRowGradientThreads + threadIdx.x) / 32;
  if (row >= a.rows) return;
  const int64_t t = row % a.tokens, h = row / a.tokens % a.heads, b = row / a.tokens / a.heads;
  const bool gated = a.gate.logits.data;
  Shares<float> shares = {1, 0};
  if (gated) shares = shares_of<float>(a.gate, b, h, t);
  float along_window = 0, along_y = 0;
  for (int c = lane_id(); c < a.dim; c += 32) {
    const float dy = read<float>(a.dy, b, h, t, c);
    along_window += dy * read<float>(a.wide, b, h, t, c);
    if (!gated) continue;
    along_y += dy * read<float>(a.y, b, h, t, c);
    if (a.d_global.data) write<float>(a.d_global, b, h, t, c, shares.rest * dy);
  }
  const auto add = [](float x, float y) { return x + y; };
  along_window = across_warp(along_window, add), along_y = across_warp(along_y, add);
  if (lane_id() != 0) return;
  float delta = shares.share * along_window;
  if (a.d_log_sum.data) delta -= load_number<float>(a.d_log_sum, b, h, t);
  store_number(a.delta, b, h, t, delta);
  if (!gated) return;
  const float d = shares.share * (along_window - along_y);
  store_number(a.share, b, h, t, shares.share);
  store_number(a.d_latents, b, h, t, -d);
  store_number(a.d_gate, b, h, t, static_cast<float>(a.gate.scale) * d);
}

struct WriteSinkGradient {
  HeadRows dk, dv;
  int key_dim, dim, sinks, kv_heads;

  __device__ __forceinline__ void operator()(int64_t c, double sum) const {
    const int64_t width = key_dim + dim, row = c / width;
    const int channel = static_cast<int>(c % width);
    const int64_t n = row / sinks / kv_heads, h = row / sinks % kv_heads, i = row % sinks;
    // Two calls: a choice between members would put them on the stack.
    if (channel < key_dim) {
      write<float>(dk, n, h, i, channel, static_cast<float>(sum));
    } else {
      write<float>(dv, n, h, i, channel - key_dim, static_cast<float>(sum));
    }
  }
};

}  // namespace

void launch_row_gradient(const RowGradientArgs& args, void* stream) {
  launch_blocks(kOp, window_row_gradient, ceil_div(args.rows, kRowGradientThreads / 32),
                kRowGradientThreads, 0, stream, args);
}

void launch_sink_sums(const WindowArgs& a, int64_t sequences, const HeadRows& dk,
                      const HeadRows& dv, void* stream) {
  const int64_t columns = sequences * a.kv_heads * a.sinks * (a.key_dim + a.dim);
  launch_blocks(kOp, sum_rows<float, WriteSinkGradient>, ceil_div(columns, kSumColumns),
                dim3(kSumColumns, kSumRows), kSumShared, stream,
                static_cast<const float*>(a.sink_sums), int64_t{a.pieces}, columns,
                WriteSinkGradient{dk, dv, a.key_dim, a.dim, a.sinks, a.kv_heads});
}

}  // namespace latte::cuda
