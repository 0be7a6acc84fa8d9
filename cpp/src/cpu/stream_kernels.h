// SPDX-License-Identifier: Apache-2.0
// What stream_kernels.cpp gives to the table of its instruction set.
#pragma once

#include "cpu/kernels.h"

namespace latte::LATTE_ISA {

int64_t step_workspace_bytes(bool is_double, const cpu::HeadTask& task);
void run_step(bool is_double, const cpu::HeadTask& task, void* workspace);
int64_t recurrence_workspace_bytes(cpu::Recurrence kernel, bool is_double, int64_t channels);
void run_recurrence(cpu::Recurrence kernel, bool is_double, const cpu::RecurrenceTask& task,
                    void* workspace);
int64_t convolution_workspace_bytes(bool is_double, int64_t channels);
void run_convolution(cpu::Convolution kernel, bool is_double, const cpu::ConvolutionTask& task,
                     void* workspace);
int64_t rotate_workspace_bytes(bool is_double, const cpu::RotateTask& task);
void run_rotate(bool is_double, const cpu::RotateTask& task, void* workspace);

}  // namespace latte::LATTE_ISA
