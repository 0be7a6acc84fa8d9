// SPDX-License-Identifier: Apache-2.0
// The border between driver and kernels for rotations: some tokens of one sequence, all heads.
#pragma once

#include "cpu/kernels.h"

namespace latte::cpu {

struct RotateTask {
  int64_t tokens = 0, heads = 0, channels = 0;
  int64_t pairs = 0;  // the first 2 pairs channels are rotated, the others copied
  const int64_t* position = nullptr;
  int64_t position_stride = 0;
  const double* rates = nullptr;  // padded_pairs() of them
  Rows x, y;                      // stride_g from head to head
  bool interleaved = false, inverse = false;
  bool stream = false;  // outputs go past the caches
};

// Whole vectors on any machine.
constexpr int64_t padded_pairs(int64_t pairs) { return (pairs + 15) / 16 * 16; }

}  // namespace latte::cpu
