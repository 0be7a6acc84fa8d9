// SPDX-License-Identifier: Apache-2.0
// One head's work of window attention as plain data: what kernels.h is for latent attention.
#pragma once

#include "cpu/kernels.h"

namespace latte::cpu {

// The queries [begin, end) of one sequence, of one query head forward and of one key/value head
// backward. Query t stands at key past + t.
struct WindowTask {
  int64_t tokens = 0, keys = 0, past = 0, key_dim = 0, dim = 0;
  int64_t group = 1;  // query heads that share the key/value head
  int64_t begin = 0, end = 0;
  int64_t window = 1;
  bool causal = true;
  double scale = 1.0;
  double softcap = 0.0;  // 0: none
  Rows q, k, v, y;
  const bool* key_mask = nullptr;
  int64_t key_mask_stride = 0;
  Column log_sum;  // log of the sum of exp over the visible keys
  Rows local;      // y of the window alone, in the compute type; optional if y is that already

  // Sinks, seen by query t if its position start + t is `reach` or more past theirs (or before
  // theirs, not causal), or by all. `reach` is the window, not cut to the keys there are.
  Rows q_sink, k_sink, v_sink;
  const int64_t* sink_position = nullptr;
  int64_t sink_position_stride = 0, sinks = 0, start = 0, reach = 1;

  // With a gate: y = share * local + rest * global, (share, rest) from the softmax of its row.
  Rows gate;    // (1 + latents) logits
  Rows global;  // compute type; in: the latents' output, out: y
  int64_t latents = 0;
  double gate_scale = 1.0;

  Rows dy, dq, dk, dv;
  Rows more_dv;  // optional, compute type: added to dv, and may be dv
  Column d_log_sum;
  // With a gate, from the stage before: dy's factor and <dy, local> times it.
  Column share, delta;
  Column d_latents;  // gradient of the log of the latents' sum
  Rows d_global;     // rest * dy
  Rows d_zeroth;     // one channel: gradient of column 0

  Rows dq_sink, dk_sink, dv_sink;
  // Sums of the last two over pieces of the sequence of sink_piece queries. Cuts are at their ends.
  void* sink_sums = nullptr;
  int64_t sink_piece = 1, sink_sums_bytes = 0;
};

// One token of one key/value head. The ring's slots lie along stride_t of k_ring and v_ring.
struct WindowStepTask {
  int64_t window = 1, key_dim = 0, dim = 0, group = 1, sinks = 0, latents = 0;
  int64_t position = 0;  // of the token
  double scale = 1.0, softcap = 0.0, gate_scale = 1.0;
  Rows q, k, v, y, k_ring, v_ring;
  const bool* valid = nullptr;
  int64_t valid_stride = 0;
  Rows q_sink, k_sink, v_sink;
  const int64_t* sink_position = nullptr;
  int64_t sink_position_stride = 0;
  Rows gate, global;
};

enum class WindowKernel : int32_t {
  forward,
  gate_gradient,  // share, delta, d_latents, d_global and d_zeroth of a task with a gate
  backward,       // dq, dk, dv, dq_sink and sink_sums
  sink_gradient,  // dk_sink and dv_sink from sink_sums, whose bytes per piece are its workspace
};

}  // namespace latte::cpu
