// SPDX-License-Identifier: Apache-2.0
// Calls over windows, alone or gated with latents, become arguments and grids.
#pragma once

#include "cuda/call.h"
#include "cuda/window_launch.h"
#include "cuda/window_rows.h"
#include "latte/latte.h"

namespace latte::cuda {

// What the kernels can take, beyond what validate() has seen: those of a step float64 too.
void check_channels(const char* op, const WindowProblem& problem);
void check_window(const char* op, const WindowProblem& problem);

template <class Params>
WindowProblem window_problem(const char* op, const Params& params) {
  const WindowProblem problem = validate(params, Memory::device);
  check_window(op, problem);
  return problem;
}

class WindowForwardPlan {
 public:
  WindowForwardPlan(const SlidingWindowForward& params, const WindowProblem& problem);
  void place(Workspace&) {}
  void run(void* stream) const;

  WindowArgs args;

 private:
  DType type_;
  int64_t blocks_;
};

class WindowBackwardPlan {
 public:
  WindowBackwardPlan(const SlidingWindowBackward& params, const WindowProblem& problem);
  void place(Workspace& workspace);
  // Before anything is launched: whether the current device can hold a block.
  void check_device(const char* op) const;
  // `rows` before the kernels of the window, which may have others between.
  void run_rows(void* stream) const { launch_row_gradient(rows, stream); }
  void run_window(void* stream) const;
  void run(void* stream) const {
    check_device("sliding_window_attention_backward");
    run_rows(stream);
    run_window(stream);
  }

  WindowArgs args;
  RowGradientArgs rows;

 private:
  const WindowProblem problem_;
  DType type_;
  int channels_;  // of a kernel
  HeadRows dk_sink_, dv_sink_;
};

}  // namespace latte::cuda
