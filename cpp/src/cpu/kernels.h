// SPDX-License-Identifier: Apache-2.0
// The border between the threaded driver (compiled once) and the kernels (compiled once per
// instruction set): one head's work as plain data, and a table of functions.
#pragma once

#include <cstdint>

#include "latte/latte.h"

namespace latte::cpu {

// Rows of one key/value head: element (t, g, c) of query head g within the group stands at
// data + t * stride_t + g * stride_g + c * stride_c elements. data == nullptr: absent.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride_t = 0, stride_g = 0, stride_c = 0;
};

// One number of the compute type per token and query head of the group.
struct Column {
  void* data = nullptr;
  int64_t stride_t = 0, stride_g = 0;
};

// The state of one head, in the compute type. max == nullptr and norm == nullptr: absent.
struct HeadState {
  void* max = nullptr;
  void* norm = nullptr;
  void* mean = nullptr;
  int64_t max_stride = 0, norm_stride = 0, mean_stride_l = 0, mean_stride_d = 0;
};

// One stage of one head. A short sequence is one stage; a long one is cut among threads, and its
// stages meet in states and carries (sequence_parallel.h).
struct HeadTask {
  int64_t tokens = 0, latents = 0, dim = 0;
  int64_t group = 1;           // query heads that share this key/value head
  int64_t begin = 0, end = 0;  // tokens that the stage covers
  double scale = 1.0;
  Rows q, k, v, y;
  Rows dy, dq, dk, dv;
  Column d_log_sum;  // optional, added to the gradient of every logit of q by its probability
  const bool* key_mask = nullptr;
  int64_t key_mask_stride = 0;
  HeadState initial, final;  // of a step: initial is updated in place
  HeadState other;           // what a merge adds to initial
  HeadState d_final, d_initial;
  // What backward carries over a cut: causal (frame, c, R), bidirectional H in `mean`.
  HeadState carry_in, carry_out;
  void* shared = nullptr;  // shared_bytes() that the stages of one backward task have in common
  // This task is the first of so many in an array, of heads of one sequence, that causal_forward
  // and causal_backward walk together, chunk by chunk: kHeadsTogether at most.
  int64_t together = 1;
};

enum class Kernel : int32_t {
  causal_forward,
  causal_gradient_forward,  // pass F: dq
  causal_gradient_summary,  // what the stage adds to the carry of the stage before it
  causal_gradient_reverse,  // pass R: dk, dv
  causal_backward,          // F and R of a whole sequence
  key_summary,              // the state of the stage's keys alone
  bidirectional_output,     // y from the state of all keys
  bidirectional_forward,    // the two for a whole sequence
  bidirectional_gather,     // dq and the stage's share of H
  bidirectional_spread,     // dk, dv from H of all queries
  bidirectional_backward,   // summary, gather and spread of a whole sequence
  merge_states,             // final = merge(initial, other)
  merge_carries,            // carry_out += carry_in, in carry_out's frame
  step,
};

// Recurrences and convolutions: mixers.h.
enum class Recurrence : int32_t;
enum class Convolution : int32_t;
struct RecurrenceTask;
struct ConvolutionTask;
// Of window_task.h.
struct WindowTask;
struct WindowStepTask;
enum class WindowKernel : int32_t;
// Of rotate_task.h.
struct RotateTask;

struct KernelTable {
  const char* isa;
  // Bytes of 64-byte aligned scratch that run() needs for the task; reads no tensor.
  int64_t (*workspace_bytes)(Kernel kernel, bool is_double, const HeadTask& task);
  // Bytes of HeadTask::shared, 64-byte aligned, that each backward task needs.
  int64_t (*shared_bytes)(Kernel kernel, bool is_double, const HeadTask& task);
  void (*run)(Kernel kernel, bool is_double, const HeadTask& task, void* workspace);
  // Does so many rounds of float32 multiply-adds in registers; returns the operations done.
  double (*fma_flops)(int64_t iterations);
  // The same for a block of channels.
  int64_t (*recurrence_bytes)(Recurrence kernel, bool is_double, int64_t channels);
  void (*recurrence)(Recurrence kernel, bool is_double, const RecurrenceTask& task,
                     void* workspace);
  int64_t (*convolution_bytes)(bool is_double, int64_t channels);
  void (*convolution)(Convolution kernel, bool is_double, const ConvolutionTask& task,
                      void* workspace);
  // The same pair for windows, and for one token of a window.
  int64_t (*window_workspace_bytes)(WindowKernel kernel, bool is_double, const WindowTask& task);
  void (*run_window)(WindowKernel kernel, bool is_double, const WindowTask& task, void* workspace);
  int64_t (*window_step_workspace_bytes)(bool is_double, const WindowStepTask& task);
  void (*run_window_step)(bool is_double, const WindowStepTask& task, void* workspace);
  int64_t (*rotate_bytes)(bool is_double, const RotateTask& task);
  void (*rotate)(bool is_double, const RotateTask& task, void* workspace);
};

// The table in use, chosen on the first call.
const KernelTable& kernels();

}  // namespace latte::cpu
