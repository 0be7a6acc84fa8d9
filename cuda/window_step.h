// SPDX-License-Identifier: Apache-2.0
// The arguments of a step over windows, which Macchiato's has too.
#pragma once

#include "cuda/window_gate.cuh"

namespace latte::cuda {

struct WindowStepParams {
  Rows q, k, v, y, q_sink;                  // (N,heads,C)
  HeadRows k_ring, v_ring, k_sink, v_sink;  // (N,Hk,W,C) and (N,Hk,sinks,C)
  bool* valid = nullptr;                    // (N,W)
  int64_t* position = nullptr;              // (N,)
  const int64_t* sink_position = nullptr;   // (N,sinks)
  int64_t valid_stride_n = 0, valid_stride_i = 0, position_stride = 0;
  int64_t sink_stride_n = 0, sink_stride_i = 0;
  GateArgs gate;
  Rows global;  // (N,H,D) compute type, with a gate over latents
  int64_t sequences = 0, kv_heads = 0, group = 1, window = 1, key_dim = 0, dim = 0, sinks = 0;
  double scale = 1, softcap = 0;
};

// Checks what every kernel here can take beyond what validate() has seen.
WindowStepParams window_step_params(const char* op, const SlidingWindowStep& params,
                                    const WindowProblem& problem);
void launch_window_step(const char* op, const WindowStepParams& p, bool is_double, void* stream);

}  // namespace latte::cuda
