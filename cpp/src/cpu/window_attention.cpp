// SPDX-License-Identifier: Apache-2.0
// Windows alone: the calls of latte.h.
#include "cpu/window_call.h"

namespace latte {
namespace {

constexpr const char* kForward = "sliding_window_attention";
constexpr const char* kBackward = "sliding_window_attention_backward";
constexpr const char* kStep = "sliding_window_attention_step";

constexpr auto kNothing = [](auto&&...) {};

template <class Call, class Params>
int64_t call_workspace(const Params& params, const char* op, int threads) {
  validate_threads(op, threads);
  const WindowProblem problem = validate(params);
  return Call(params, problem, threads).bytes() + cpu::kAlignment;
}
template <class Call, class Params>
void run_call(const Params& params, const char* op, void* workspace, int threads) {
  validate_threads(op, threads);
  const WindowProblem problem = validate(params);
  Call(params, problem, threads).run(cpu::workspace_base(workspace, op), kNothing);
}

}  // namespace

int64_t workspace_bytes(const SlidingWindowForward& params, int threads) {
  return call_workspace<cpu::WindowForwardCall>(params, kForward, threads);
}
int64_t workspace_bytes(const SlidingWindowBackward& params, int threads) {
  return call_workspace<cpu::WindowBackwardCall>(params, kBackward, threads);
}
int64_t workspace_bytes(const SlidingWindowStep& params, int threads) {
  return call_workspace<cpu::WindowStepCall>(params, kStep, threads);
}

void sliding_window_forward(const SlidingWindowForward& params, void* workspace, int threads) {
  run_call<cpu::WindowForwardCall>(params, kForward, workspace, threads);
}
void sliding_window_backward(const SlidingWindowBackward& params, void* workspace, int threads) {
  run_call<cpu::WindowBackwardCall>(params, kBackward, workspace, threads);
}
void sliding_window_step(const SlidingWindowStep& params, void* workspace, int threads) {
  run_call<cpu::WindowStepCall>(params, kStep, workspace, threads);
}

}  // namespace latte
