// SPDX-License-Identifier: Apache-2.0
#include "cuda/call.h"
#include "cuda/window_call.h"
#include "cuda/window_step.cuh"
#include "latte/cuda.h"

namespace latte::cuda {
namespace {

constexpr const char* kOp = "sliding_window_attention_step";

template <class T>
void (*step_kernel(int64_t channels))(WindowStepParams) {
  return channels <= 64    ? window_step<T, 2>
         : channels <= 128 ? window_step<T, 4>
                           : window_step<T, 8>;
}

}  // namespace

WindowStepParams window_step_params(const char* op, const SlidingWindowStep& params,
                                    const WindowProblem& problem) {
  check_channels(op, problem);
  WindowStepParams p;
  p.q = rows_of(params.q), p.k = rows_of(params.k), p.v = rows_of(params.v);
  p.y = rows_of(params.y), p.q_sink = rows_of(params.q_sink);
  p.k_ring = head_rows(params.ring.key), p.v_ring = head_rows(params.ring.value);
  p.k_sink = head_rows(params.k_sink), p.v_sink = head_rows(params.v_sink);
  p.valid = static_cast<bool*>(params.ring.valid.data);
  p.valid_stride_n = params.ring.valid.stride[0], p.valid_stride_i = params.ring.valid.stride[1];
  p.position = static_cast<int64_t*>(params.ring.position.data);
  p.position_stride = params.ring.position.stride[0];
  p.sink_position = static_cast<const int64_t*>(params.sink_position.data);
  p.sink_stride_n = params.sink_position.stride[0];
  p.sink_stride_i = params.sink_position.stride[1];
  p.sequences = problem.batch, p.kv_heads = problem.kv_heads;
  p.group = problem.heads / problem.kv_heads, p.window = problem.keys;
  p.key_dim = problem.key_dim, p.dim = problem.dim, p.sinks = problem.sinks;
  p.scale = params.scale, p.softcap = params.softcap;
  return p;
}

void launch_window_step(const char* op, const WindowStepParams& p, bool is_double, void* stream) {
  with_compute_type(is_double, [&](auto type) {
    using T = typename decltype(type)::type;
    launch_blocks(op, step_kernel<T>(most(p.key_dim, p.dim)), p.sequences * p.kv_heads,
                  dim3(kStepThreads), WindowStepShared<T>::bytes(p.key_dim, p.dim), stream, p);
  });
  launch_blocks(op, window_step_advance, ceil_div(p.sequences, kStepThreads), dim3(kStepThreads), 0,
                stream, p);
}

int64_t workspace_bytes(const SlidingWindowStep& params) {
  window_step_params(kOp, params, validate(params, Memory::device));
  return 0;
}

void sliding_window_step(const SlidingWindowStep& params, void* /*workspace*/, void* stream) {
  const WindowProblem problem = validate(params, Memory::device);
  launch_window_step(kOp, window_step_params(kOp, params, problem), problem.is_double, stream);
}

}  // namespace latte::cuda
