// SPDX-License-Identifier: Apache-2.0
// What window_kernels.cpp gives to the table of its instruction set.
#pragma once

#include "cpu/window_task.h"

namespace latte::LATTE_ISA {

int64_t window_workspace_bytes(cpu::WindowKernel kernel, bool is_double,
                               const cpu::WindowTask& task);
void run_window(cpu::WindowKernel kernel, bool is_double, const cpu::WindowTask& task,
                void* workspace);
int64_t window_step_workspace_bytes(bool is_double, const cpu::WindowStepTask& task);
void run_window_step(bool is_double, const cpu::WindowStepTask& task, void* workspace);

}  // namespace latte::LATTE_ISA
