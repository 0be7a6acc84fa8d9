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

// The state of one head, in the compute type. max == nullptr and norm == nullptr: absent.
struct HeadState {
  void* max = nullptr;
  void* norm = nullptr;
  void* mean = nullptr;
  int64_t max_stride = 0, norm_stride = 0, mean_stride_l = 0, mean_stride_d = 0;
};

struct HeadTask {
  int64_t tokens = 0, latents = 0, dim = 0;
  int64_t group = 1;  // query heads that share this key/value head
  double scale = 1.0;
  Rows q, k, v, y;
  Rows dy, dq, dk, dv;
  const bool* key_mask = nullptr;
  int64_t key_mask_stride = 0;
  HeadState initial, final;  // of a step: initial is updated in place
  HeadState d_final, d_initial;
};

enum class Kernel : int32_t {
  causal_forward,
  causal_backward,
  bidirectional_forward,
  bidirectional_backward,
  step,
};

struct KernelTable {
  const char* isa;
  // Bytes of 64-byte aligned scratch that run() needs for the task; reads no tensor.
  int64_t (*workspace_bytes)(Kernel kernel, bool is_double, const HeadTask& task);
  void (*run)(Kernel kernel, bool is_double, const HeadTask& task, void* workspace);
};

// The table in use, chosen on the first call.
const KernelTable& kernels();

}  // namespace latte::cpu
