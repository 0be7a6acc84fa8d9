// SPDX-License-Identifier: Apache-2.0
// Passes over rows around the gradients of windows.
#pragma once

#include "cuda/window.cuh"

namespace latte::cuda {

// What the gradients of a window, alone or gated, need of every query before they begin.
struct RowGradientArgs {
  HeadRows dy, wide, y;                  // y: the sum of both parts
  View d_log_sum;                        // of a window alone, optional
  View share, delta, d_latents, d_gate;  // out; all but delta only with a gate
  HeadRows d_global;                     // out, float32: rest dy
  GateArgs gate;
  int64_t rows = 0, tokens = 0;  // rows: B H T
  int heads = 0, dim = 0;
};

void launch_row_gradient(const RowGradientArgs& args, void* stream);

// dk_sink and dv_sink (N,Hk,sinks,C) out of the sums of the pieces.
void launch_sink_sums(const WindowArgs& args, int64_t sequences, const HeadRows& dk,
                      const HeadRows& dv, void* stream);

}  // namespace latte::cuda
