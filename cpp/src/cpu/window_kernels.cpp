// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, as kernels.cpp, beside which it compiles in parallel.
#include "cpu/window_kernels.h"

#include "cpu/window_backward.h"
#include "cpu/window_step.h"

namespace latte::LATTE_ISA {
namespace {

using cpu::WindowKernel;

template <class T>
int64_t workspace(WindowKernel kernel, const WindowTask& task) {
  Arena arena(nullptr);
  switch (kernel) {
    case WindowKernel::forward:
      WindowForward<T>(arena, task);
      break;
    case WindowKernel::backward:
      WindowBackward<T>(arena, task);
      break;
    case WindowKernel::gate_gradient:
      GateScratch<T>(arena, task);
      break;
    case WindowKernel::sink_gradient:
      SinkSums<T>(arena, task);
      break;
  }
  return arena.used();
}

template <class T>
void run(WindowKernel kernel, const WindowTask& task, void* memory) {
  const FlushSubnormals flush;
  Arena arena(memory);
  switch (kernel) {
    case WindowKernel::forward:
      WindowForward<T>(arena, task).run();
      break;
    case WindowKernel::backward:
      WindowBackward<T>(arena, task).run();
      break;
    case WindowKernel::gate_gradient:
      gate_gradient<T>(task, arena);
      break;
    case WindowKernel::sink_gradient:
      sink_gradient<T>(task, arena);
      break;
  }
}

template <class T>
int64_t step_workspace(const WindowStepTask& task) {
  Arena arena(nullptr);
  WindowStepScratch<T>(arena, task);
  return arena.used();
}

template <class T>
void step(const WindowStepTask& task, void* memory) {
  const FlushSubnormals flush;
  window_step<T>(task, Arena(memory));
}

}  // namespace

int64_t window_workspace_bytes(WindowKernel kernel, bool is_double, const WindowTask& task) {
  return is_double ? workspace<double>(kernel, task) : workspace<float>(kernel, task);
}
void run_window(WindowKernel kernel, bool is_double, const WindowTask& task, void* memory) {
  is_double ? run<double>(kernel, task, memory) : run<float>(kernel, task, memory);
}
int64_t window_step_workspace_bytes(bool is_double, const WindowStepTask& task) {
  return is_double ? step_workspace<double>(task) : step_workspace<float>(task);
}
void run_window_step(bool is_double, const WindowStepTask& task, void* memory) {
  is_double ? step<double>(task, memory) : step<float>(task, memory);
}

}  // namespace latte::LATTE_ISA
