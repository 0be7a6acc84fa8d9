// SPDX-License-Identifier: Apache-2.0
// The kernels that memory bounds: one token, recurrences, convolutions, rotations. Compiled once
// per instruction set, as kernels.cpp, beside which it compiles in parallel.
#include "cpu/stream_kernels.h"

#include "cpu/recurrence.h"
#include "cpu/rotate.h"
#include "cpu/short_conv.h"
#include "cpu/step.h"

namespace latte::LATTE_ISA {

int64_t step_workspace_bytes(bool is_double, const HeadTask& task) {
  Arena arena(nullptr);
  is_double ? void(StepScratch<double>(arena, task)) : void(StepScratch<float>(arena, task));
  return arena.used();
}
void run_step(bool is_double, const HeadTask& task, void* memory) {
  is_double ? step<double>(task, Arena(memory)) : step<float>(task, Arena(memory));
}

int64_t recurrence_workspace_bytes(Recurrence kernel, bool is_double, int64_t channels) {
  return is_double ? recurrence_bytes<double>(kernel, channels)
                   : recurrence_bytes<float>(kernel, channels);
}
void run_recurrence(Recurrence kernel, bool is_double, const RecurrenceTask& task, void* memory) {
  const FlushSubnormals flush;
  is_double ? run_recurrence<double>(kernel, task, memory)
            : run_recurrence<float>(kernel, task, memory);
  if (task.stream) stream_fence();
}

int64_t convolution_workspace_bytes(bool is_double, int64_t channels) {
  return is_double ? convolution_bytes<double>(channels) : convolution_bytes<float>(channels);
}
void run_convolution(Convolution kernel, bool is_double, const ConvolutionTask& task,
                     void* memory) {
  const FlushSubnormals flush;
  is_double ? run_convolution<double>(kernel, task, memory)
            : run_convolution<float>(kernel, task, memory);
  if (task.stream) stream_fence();
}

int64_t rotate_workspace_bytes(bool is_double, const RotateTask& task) {
  return is_double ? Rotation<double>(task, Arena(nullptr)).bytes()
                   : Rotation<float>(task, Arena(nullptr)).bytes();
}
void run_rotate(bool is_double, const RotateTask& task, void* memory) {
  is_double ? Rotation<double>(task, Arena(memory)).run()
            : Rotation<float>(task, Arena(memory)).run();
  if (task.stream) stream_fence();
}

}  // namespace latte::LATTE_ISA
