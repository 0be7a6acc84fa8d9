// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, into the namespace LATTE_ISA.
#include "cpu/kernels.h"

#include "cpu/bidirectional.h"
#include "cpu/causal.h"
#include "cpu/step.h"

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
    case Kernel::causal_backward:
      CausalBackwardScratch<T>(
          arena, task, RowView<T>(task.dk, PerRow::first, task.latents, task.group).in_place());
      break;
    case Kernel::bidirectional_forward:
      BidirectionalScratch<T>(arena, task, false);
      break;
    case Kernel::bidirectional_backward:
      BidirectionalScratch<T>(arena, task, true);
      break;
    case Kernel::step:
      StepScratch<T>(arena, task);
      break;
  }
  return arena.used();
}

template <class T>
void run(Kernel kernel, const HeadTask& task, void* memory) {
  const FlushSubnormals flush;
  const Arena arena(memory);
  switch (kernel) {
    case Kernel::causal_forward:
      causal_forward<T>(task, arena);
      break;
    case Kernel::causal_backward:
      causal_backward<T>(task, arena);
      break;
    case Kernel::bidirectional_forward:
      Bidirectional<T>(task, arena, false).forward();
      break;
    case Kernel::bidirectional_backward:
      Bidirectional<T>(task, arena, true).backward();
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
      [](Kernel kernel, bool is_double, const HeadTask& task, void* memory) {
        is_double ? run<double>(kernel, task, memory) : run<float>(kernel, task, memory);
      },
  };
  return kTable;
}

}  // namespace latte::LATTE_ISA
