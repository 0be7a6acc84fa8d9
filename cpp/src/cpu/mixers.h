// SPDX-License-Identifier: Apache-2.0
// The border between driver and kernels for recurrences and convolutions, as kernels.h is for
// attention: a block of channels of one sequence, or of a segment of it, as plain data.
//
// Rows come in the order of the scan: the driver turns a reversed sequence, and the backward pass
// of any, around by giving them a negative stride. Absent rows read as zero.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace latte::cpu {

enum class Recurrence : int32_t {
  linear_forward,
  linear_summary,  // what the segment does to a carry: h_end = product * h + end
  linear_backward,
  linear_backward_summary,
  gated_forward,  // RG-LRU
  gated_summary,
  gated_backward,
  gated_backward_summary,
  gated_reduce,  // d_log_lambda from the partial sums
};

struct RecurrenceTask {
  int64_t tokens = 0, channels = 0;
  // Linear: a, b, h. Gated: b is x, h is y.
  Rows a, b, h, gate_a, gate_x;
  Rows dh, da, db, d_gate_a, d_gate_x;
  Rows log_lambda, d_log_lambda;  // one row each
  const bool* mask = nullptr;     // gated, one per token
  int64_t mask_stride = 0;
  int64_t first = -1;  // gated: the token whose square root is 1
  // One row each. Forward: h before the first token, and the last h. Backward: h before the token
  // that the scan, which runs from the end, comes to last; cotangent of the last h; and its result.
  Rows initial, final, d_final, d_initial;
  // A segment of a cut sequence: the summaries of the segments between `initial` (or `d_final`) and
  // this one, each a row of products and a row of ends in the compute type; where to put its own.
  const void* summaries = nullptr;
  int64_t summary_count = 0;
  void* summary = nullptr;
  // Sums over tokens for d_log_lambda, one per channel; a reduction adds `partials` rows of them.
  double* partial = nullptr;
  int64_t partials = 0, partial_stride = 0;
  bool accumulate = false;  // add to `partial` instead of setting it
  bool stream = false;      // outputs go past the caches
};

enum class Convolution : int32_t {
  forward,
  backward,
  reduce,  // d_weight and d_bias from the partial sums
};

struct ConvolutionTask {
  int64_t tokens = 0, channels = 0;      // of the whole sequence
  int64_t begin = 0, end = 0;            // the tokens to work on
  bool is_first = true, is_last = true;  // the segment that writes d_initial, and final
  int64_t width = 1, left = 0;           // K, and how far the window reaches back
  Rows x, y, dy, dx;
  Rows weight, bias;  // K rows and one; gradients d_weight and d_bias likewise
  Rows d_weight, d_bias;
  Rows initial, final, d_final, d_initial;  // K - 1 rows
  // K + 1 rows of sums over tokens, `partial_stride` apart, for d_weight and d_bias; a reduction
  // adds `partials` groups of them.
  double* partial = nullptr;
  int64_t partials = 0, partial_stride = 0;
  bool accumulate = false;
  bool stream = false;
};

// Channels of a row in a summary, and the grain of a block of channels: whole vectors on any
// machine.
constexpr int64_t padded_channels(int64_t channels) { return (channels + 15) / 16 * 16; }

}  // namespace latte::cpu
