// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, into the namespace LATTE_ISA.
#include "cpu/kernels.h"

#include "cpu/bidirectional.h"
#include "cpu/causal.h"
#include "cpu/peak.h"
#include "cpu/recurrence.h"
#include "cpu/rotate.h"
#include "cpu/short_conv.h"
#include "cpu/step.h"
#include "cpu/window_kernels.h"

namespace latte::LATTE_ISA {
namespace {

using cpu::Kernel;

template <class T>
int64_t workspace(Kernel kernel, const HeadTask& task) {
  Arena arena(nullptr);
  switch (kernel) {
    case Kernel::causal_forward:
      CausalForwardScratch<T>(arena, task);
      break;
    case Kernel::causal_gradient_forward:
    case Kernel::causal_gradient_summary:
    case Kernel::causal_gradient_reverse:
    case Kernel::causal_backward:
      CausalBackwardScratch<T>(arena, task);
      break;
    case Kernel::key_summary:
    case Kernel::bidirectional_output:
    case Kernel::bidirectional_forward:
      BidirectionalScratch<T>(arena, task, false);
      break;
    case Kernel::bidirectional_gather:
    case Kernel::bidirectional_spread:
    case Kernel::bidirectional_backward:
      BidirectionalScratch<T>(arena, task, true);
      break;
    case Kernel::merge_states:
    case Kernel::merge_carries:
      break;
    case Kernel::step:
      StepScratch<T>(arena, task);
      break;
  }
  return arena.used();
}

template <class T>
int64_t shared(Kernel kernel, const HeadTask& task) {
  Arena arena(nullptr);
  if (kernel == Kernel::causal_backward) CausalShared<T>(arena, task);
  return arena.used();
}

template <class T>
CausalBackwardScratch<T> causal_scratch(const HeadTask& task, void* memory) {
  Arena arena(memory);
  return {arena, task};
}

template <class T>
void run(Kernel kernel, const HeadTask& task, void* memory) {
  const FlushSubnormals flush;
  const Arena arena(memory);
  switch (kernel) {
    case Kernel::causal_forward:
      causal_forward<T>(task, arena);
      break;
    case Kernel::causal_gradient_forward:
      CausalBackward<T>(task, causal_scratch<T>(task, memory)).forward();
      break;
    case Kernel::causal_gradient_summary:
      CausalBackward<T>(task, causal_scratch<T>(task, memory)).summarise();
      break;
    case Kernel::causal_gradient_reverse:
      CausalBackward<T>(task, causal_scratch<T>(task, memory)).reverse();
      break;
    case Kernel::causal_backward:
      causal_backward<T>(task, arena);
      break;
    case Kernel::key_summary:
      Bidirectional<T>(task, arena, false).summarise();
      break;
    case Kernel::bidirectional_output:
      Bidirectional<T>(task, arena, false).output();
      break;
    case Kernel::bidirectional_forward:
      Bidirectional<T>(task, arena, false).forward();
      break;
    case Kernel::bidirectional_gather:
      Bidirectional<T>(task, arena, true).gather();
      break;
    case Kernel::bidirectional_spread:
      Bidirectional<T>(task, arena, true).spread();
      break;
    case Kernel::bidirectional_backward:
      Bidirectional<T>(task, arena, true).backward();
      break;
    case Kernel::merge_states:
      merge_states<T>(task);
      break;
    case Kernel::merge_carries:
      merge_carries<T>(task);
      break;
    case Kernel::step:
      step<T>(task, arena);
      break;
  }
}

}  // namespace

const cpu::KernelTable& table() {
  static constexpr cpu::KernelTable kTable = {
      LATTE_ISA_NAME,
      [](Kernel kernel, bool is_double, const HeadTask& task) {
        return is_double ? workspace<double>(kernel, task) : workspace<float>(kernel, task);
      },
      [](Kernel kernel, bool is_double, const HeadTask& task) {
        return is_double ? shared<double>(kernel, task) : shared<float>(kernel, task);
      },
      [](Kernel kernel, bool is_double, const HeadTask& task, void* memory) {
        is_double ? run<double>(kernel, task, memory) : run<float>(kernel, task, memory);
      },
      fma_flops,
      [](Recurrence kernel, bool is_double, int64_t channels) {
        return is_double ? recurrence_bytes<double>(kernel, channels)
                         : recurrence_bytes<float>(kernel, channels);
      },
      [](Recurrence kernel, bool is_double, const RecurrenceTask& task, void* memory) {
        const FlushSubnormals flush;
        is_double ? run_recurrence<double>(kernel, task, memory)
                  : run_recurrence<float>(kernel, task, memory);
        if (task.stream) stream_fence();
      },
      [](bool is_double, int64_t channels) {
        return is_double ? convolution_bytes<double>(channels) : convolution_bytes<float>(channels);
      },
      [](Convolution kernel, bool is_double, const ConvolutionTask& task, void* memory) {
        const FlushSubnormals flush;
        is_double ? run_convolution<double>(kernel, task, memory)
                  : run_convolution<float>(kernel, task, memory);
        if (task.stream) stream_fence();
      },
      window_workspace_bytes,
      run_window,
      window_step_workspace_bytes,
      run_window_step,
      [](bool is_double, const RotateTask& task) {
        return is_double ? Rotation<double>(task, Arena(nullptr)).bytes()
                         : Rotation<float>(task, Arena(nullptr)).bytes();
      },
      [](bool is_double, const RotateTask& task, void* memory) {
        is_double ? Rotation<double>(task, Arena(memory)).run()
                  : Rotation<float>(task, Arena(memory)).run();
        if (task.stream) stream_fence();
      },
  };
  return kTable;
}

}  // namespace latte::LATTE_ISA
