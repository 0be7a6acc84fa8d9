// SPDX-License-Identifier: Apache-2.0
// The border: every public function checks its parameters here, once, and gets its sizes back.
#pragma once

#include "latte/latte.h"

namespace latte {

struct Problem {
  int64_t batch = 0, heads = 0, kv_heads = 0, tokens = 0, latents = 0, dim = 0;
  int64_t sequences = 0;  // batch, or the number of packed sequences
  bool packed = false;
  bool is_double = false;
};

// Where the tensors lie: the values of cu_seqlens and of positions are checked on the host only.
// Kernels of a device bound what they read there.
enum class Memory { host, device };

struct WindowProblem {
  int64_t batch = 0, heads = 0, kv_heads = 0, tokens = 0, key_dim = 0, dim = 0;
  int64_t keys = 0;       // rows of k
  int64_t sequences = 0;  // batch, or the number of packed sequences
  int64_t latents = 0, sinks = 0;
  bool packed = false;
  bool is_double = false;
};

WindowProblem validate(const SlidingWindowForward& params, Memory memory = Memory::host);
WindowProblem validate(const SlidingWindowBackward& params, Memory memory = Memory::host);
WindowProblem validate(const SlidingWindowStep& params, Memory memory = Memory::host);
WindowProblem validate(const MacchiatoForward& params, Memory memory = Memory::host);
WindowProblem validate(const MacchiatoBackward& params, Memory memory = Memory::host);
WindowProblem validate(const MacchiatoStep& params, Memory memory = Memory::host);

Problem validate(const LatentAttentionForward& params, Memory memory = Memory::host);
Problem validate(const LatentAttentionBackward& params, Memory memory = Memory::host);
Problem validate(const LatentAttentionStep& params);
Problem validate(const StateMerge& params);
void validate_threads(const char* op, int threads);

// Element i of a validated cu_seqlens.
inline int64_t sequence_border(const Tensor& cu_seqlens, int64_t i) {
  const int64_t at = i * cu_seqlens.stride[0];
  return cu_seqlens.dtype == DType::int32 ? static_cast<const int32_t*>(cu_seqlens.data)[at]
                                          : static_cast<const int64_t*>(cu_seqlens.data)[at];
}

inline bool present(const Tensor& tensor) { return tensor.data != nullptr || tensor.rank != 0; }

}  // namespace latte
