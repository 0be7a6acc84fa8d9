// SPDX-License-Identifier: Apache-2.0
// What the drivers of recurrences and convolutions share: views of the caller's tensors, and how
// sequences and channels are spread over tasks.
#pragma once

#include "common/validate.h"
#include "common/validate_mixers.h"
#include "cpu/heuristics.h"
#include "cpu/mixers.h"
#include "cpu/parallel.h"
#include "cpu/views.h"

namespace latte::cpu {

inline Rows shifted(Rows rows, int64_t t, int64_t c) {
  if (rows.data)
    rows.data = static_cast<char*>(rows.data) +
                (t * rows.stride_t + c * rows.stride_c) * element_size(rows.dtype);
  return rows;
}

// Where the tokens of a sequence lie in a (B,T,C) tensor.
struct Range {
  int64_t batch = 0, first = 0, tokens = 0;
};

inline Range range_of(const MixerProblem& p, const Tensor& cu_seqlens, int64_t sequence) {
  if (!p.packed) return {sequence, 0, p.tokens};
  const int64_t first = sequence_border(cu_seqlens, sequence);
  return {0, first, sequence_border(cu_seqlens, sequence + 1) - first};
}

// Rows of a sequence from channel c on, from its last token on if `turned`.
inline Rows rows_of(const Tensor& t, const Range& range, int64_t c, bool turned = false) {
  if (!present(t)) return {};
  const Rows all{t.data, t.dtype, t.stride[1], 0, t.stride[2]};
  Rows rows = shifted({t.data, t.dtype, t.stride[0], 0, 0}, range.batch, 0);
  rows.stride_t = all.stride_t, rows.stride_c = all.stride_c;
  rows = shifted(rows, range.first, c);
  if (!turned) return rows;
  rows = shifted(rows, range.tokens - 1, 0);
  rows.stride_t = -rows.stride_t;
  return rows;
}

// One row of an (N,C) tensor, or the rows of an (N,R,C) tensor, of a sequence.
inline Rows state_of(const Tensor& t, int64_t sequence, int64_t c) {
  if (!present(t)) return {};
  const bool rows = t.rank == 3;
  Rows r = shifted({t.data, t.dtype, t.stride[0], 0, 0}, sequence, 0);
  r.stride_t = rows ? t.stride[1] : 0;
  r.stride_c = t.stride[rows ? 2 : 1];
  return shifted(r, 0, c);
}

// A (C,) tensor as one row, a (C,K) tensor as K rows.
inline Rows parameter_of(const Tensor& t, int64_t c) {
  if (!present(t)) return {};
  return shifted({t.data, t.dtype, t.rank == 2 ? t.stride[1] : 0, 0, t.stride[0]}, 0, c);
}

// Blocks of channels times groups of neighbouring sequences: groups, so that thousands of short
// sequences are neither thousands of tasks nor thousands of partial sums.
class Grid {
 public:
  Grid(const MixerProblem& p, int threads) : sequences_(p.sequences), channels_(p.channels) {
    groups_ = sequences_ < kMaxGroups ? sequences_ : kMaxGroups;
    const int64_t blocks = channel_blocks(channels_, groups_, threads);
    width_ = padded_channels((channels_ + blocks - 1) / blocks);
    blocks_ = (channels_ + width_ - 1) / width_;
  }
  int64_t groups() const { return groups_; }
  int64_t blocks() const { return blocks_; }
  int64_t block_width() const { return width_; }
  int64_t first_channel(int64_t block) const { return block * width_; }
  int64_t channels(int64_t block) const {
    const int64_t rest = channels_ - block * width_;
    return rest < width_ ? rest : width_;
  }
  // Sequences [border(g), border(g + 1)) are group g.
  int64_t border(int64_t group) const { return group * sequences_ / groups_; }

  static constexpr int64_t kMaxGroups = 256;

 private:
  int64_t sequences_, channels_, groups_ = 0, blocks_ = 1, width_ = 0;
};

// workspace_bytes() and the call itself, by a Plan<Call> of the operator.
template <template <class> class Plan, class Call, class Params>
int64_t call_workspace(const Params& params, const char* op, int threads) {
  const Call call(params);
  validate_threads(op, threads);
  return Plan<Call>(call, threads).bytes() + kAlignment;
}
template <template <class> class Plan, class Call, class Params>
void run_call(const Params& params, const char* op, void* workspace, int threads) {
  const Call call(params);
  validate_threads(op, threads);
  const Plan<Call> plan(call, threads);
  plan.run(workspace_base(workspace, op));
}

}  // namespace latte::cpu
