// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, into the namespace LATTE_ISA.
#include "cpu/kernels.h"

#include "cpu/bidirectional.h"
#include "cpu/causal.h"
#include "cpu/peak.h"
#include "cpu/stream_kernels.h"
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
      return step_workspace_bytes(sizeof(T) == 8, task);
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
      run_step(sizeof(T) == 8, task, memory);
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
      recurrence_workspace_bytes,
      run_recurrence,
      convolution_workspace_bytes,
      run_convolution,
      window_workspace_bytes,
      run_window,
      window_step_workspace_bytes,
      run_window_step,
      rotate_workspace_bytes,
      run_rotate,
  };
  return kTable;
}

}  // namespace latte::LATTE_ISA
