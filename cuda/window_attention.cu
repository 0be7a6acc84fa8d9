// SPDX-License-Identifier: Apache-2.0
// Windows alone: the calls of cuda.h.
#include "cuda/window_call.h"
#include "latte/cuda.h"

namespace latte::cuda {
namespace {

constexpr const char* kForward = "sliding_window_attention";
constexpr const char* kBackward = "sliding_window_attention_backward";

template <class Plan, class Params>
Plan plan_of(const char* op, const Params& params) {
  return Plan(params, window_problem(op, params));
}

}  // namespace

int64_t workspace_bytes(const SlidingWindowForward& params) {
  return workspace_of(plan_of<WindowForwardPlan>(kForward, params));
}
int64_t workspace_bytes(const SlidingWindowBackward& params) {
  return workspace_of(plan_of<WindowBackwardPlan>(kBackward, params));
}

void sliding_window_forward(const SlidingWindowForward& params, void* workspace, void* stream) {
  run_plan(kForward, plan_of<WindowForwardPlan>(kForward, params), workspace, stream);
}
void sliding_window_backward(const SlidingWindowBackward& params, void* workspace, void* stream) {
  run_plan(kBackward, plan_of<WindowBackwardPlan>(kBackward, params), workspace, stream);
}

}  // namespace latte::cuda
