// SPDX-License-Identifier: Apache-2.0
// Summaries of the parts of a sequence become the states before them, and that of the whole.
#pragma once

#include "cuda/state.cuh"

namespace latte::cuda {

struct FoldArgs {
  StateView initial, parts, total;  // absent: the empty state, and no total
  int kv_heads = 0, latents = 0, dim = 0;
  int count = 0;                 // parts of a sequence that have a summary
  int stride = 0;                // state numbers of a sequence
  bool writes_prefixes = false;  // part i receives the state before it, part `count` the total
};

// Of so many sequences, heads and latents.
void launch_fold(const char* op, const FoldArgs& args, int64_t rows, void* stream);

}  // namespace latte::cuda
