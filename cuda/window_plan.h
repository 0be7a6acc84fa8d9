// SPDX-License-Identifier: Apache-2.0
// Tiles of window attention: pure functions of the shape, as in heuristics.h.
#pragma once

#include "cuda/attention_plan.h"

namespace latte::cuda {

// Rows that a block owns: queries, or keys for their gradients; 16 for each of its four warps.
inline constexpr int kOwnRows = 64;

// Channels of a kernel, of keys and of values alike.
constexpr int channel_tile(int64_t channels) {
  return channels <= 32 ? 32 : channels <= 64 ? 64 : channels <= 128 ? 128 : 256;
}

// Channels of dk and dv that one block sums: two accumulators of 128 are half of its registers.
// Other blocks have the others, and compute the weights again.
constexpr int gradient_slice(int channel_tile) { return channel_tile < 128 ? channel_tile : 128; }

// Rows that are streamed past a block at a time: as many as leave room for a second block on sm_90,
// and for one on every device.
constexpr int streamed_rows(int64_t own_bytes, int64_t bytes_per_row) {
  const int64_t room = 99 * 1024 - own_bytes;
  return 64 * bytes_per_row <= room ? 64 : 32 * bytes_per_row <= room ? 32 : 16;
}

// Shared memory of a block that owns `owned` arrays of kOwnRows rows and streams two past these.
struct WindowBytes {
  int64_t row, own, stage;
  int streamed;  // rows of a stage

  constexpr int64_t total(int64_t stages) const { return own + stages * stage; }
};
constexpr WindowBytes window_bytes(int64_t element, int64_t channels, int owned) {
  WindowBytes b{};
  b.row = channels * element + kRowPadding;
  b.own = owned * kOwnRows * b.row;
  // Outputs of 256 channels leave registers for the logits of 32 rows.
  b.streamed = static_cast<int>(least(streamed_rows(b.own, 2 * b.row), channels == 256 ? 32 : 64));
  b.stage = 2 * b.streamed * b.row;
  return b;
}

// Tiles of all sequences: that of a packed one begins a tile of its own.
constexpr int64_t tile_slots(int64_t rows, int64_t sequences, bool packed) {
  return packed ? rows / kOwnRows + sequences : ceil_div(rows, kOwnRows);
}

// Whether a sink is seen from position `at`: it is `reach` or more before, or behind if not causal.
// Positions may be any: the difference of two is exact as an unsigned number.
constexpr bool is_distant(int64_t at, int64_t position, int64_t reach, bool causal) {
  const uint64_t ahead = static_cast<uint64_t>(at) - static_cast<uint64_t>(position);
  if (at >= position) return ahead >= static_cast<uint64_t>(reach);
  return !causal && uint64_t{0} - ahead >= static_cast<uint64_t>(reach);
}

}  // namespace latte::cuda
