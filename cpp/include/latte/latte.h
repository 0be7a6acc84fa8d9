// SPDX-License-Identifier: Apache-2.0
// Latent attention (Latte, arXiv 2402.17512): y_t = sum_l p(l|t) E[v | l, s <= t].
//
// Notation, used in every file: B batch, T tokens, H query heads, Hk key/value heads (H a multiple
// of Hk), L latents per head, D value channels per head, N sequences (B, or len(cu_seqlens) - 1
// when sequences are packed).
//
// The library knows no torch and no Python and allocates nothing: tensors, states and workspace
// belong to the caller. Every function checks its arguments once and throws latte::Error.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "latte/export.h"

namespace latte {

enum class DType : int32_t { float32, float64, bfloat16, float16, boolean, int32, int64 };

// A view of the caller's memory. `stride` counts elements, may be zero (expanded) or negative.
// data == nullptr means "absent" where a field is optional.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t rank = 0;
  int64_t shape[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};
};

// The summary of a set of tokens per head and latent (reference.py defines it in Python):
//   max (N,Hk,L) = max_s k_s, -inf for the empty set;  norm (N,Hk,L) = sum_s exp(k_s - max);
//   mean (N,Hk,L,D) = sum_s softmax(k)_s v_s.
// float64 if q, k and v are float64, float32 otherwise.
struct State {
  Tensor max, norm, mean;
};

struct LatentAttentionForward {
  Tensor q;           // (B,H,T,L) logits of p(l|t)
  Tensor k;           // (B,Hk,T,L) logits of p(s|l)
  Tensor v;           // (B,Hk,T,D)
  Tensor key_mask;    // optional (B,T) boolean, false = the token is absent from every E[v|l]
  Tensor cu_seqlens;  // optional (N+1,) int32 or int64, B == 1: token ranges of N packed sequences
  State initial;      // optional, causal only
  Tensor y;           // (B,H,T,D)
  State final;        // optional; must not overlap `initial`
  bool causal = true;
  double scale = 1.0;  // multiplies the logits q and k
};

// Vector-Jacobian product of LatentAttentionForward. A state's max is a constant reference: its
// gradient flows through norm and mean, d_log_norm = norm * d_norm, and State::max is ignored in
// `d_final` and `d_initial`.
struct LatentAttentionBackward {
  Tensor q, k, v, key_mask, cu_seqlens;  // as in the forward call
  State initial;                         // as in the forward call
  Tensor dy;                             // (B,H,T,D)
  State d_final;                         // optional
  Tensor dq, dk, dv;                     // shapes of q, k, v
  State d_initial;                       // optional, present only with `initial`
  bool causal = true;
  double scale = 1.0;
};

// One token per sequence, state updated in place: constant time and memory.
struct LatentAttentionStep {
  Tensor q;     // (N,H,L)
  Tensor k;     // (N,Hk,L)
  Tensor v;     // (N,Hk,D)
  State state;  // in and out
  Tensor y;     // (N,H,D)
  double scale = 1.0;
};

// out = a + b, the state of the union of two disjoint token sets; out may be a or b itself.
struct StateMerge {
  State a, b, out;
};

class LATTE_EXPORT Error : public std::runtime_error {
 public:
  enum class Kind { value, type, runtime };
  Error(Kind kind, const std::string& what) : std::runtime_error(what), kind(kind) {}
  Kind kind;
};

// Workspace that the same call needs with that many threads, in bytes (64-byte alignment is
// arranged inside). Validates the parameters.
LATTE_EXPORT int64_t workspace_bytes(const LatentAttentionForward& params, int threads);
LATTE_EXPORT int64_t workspace_bytes(const LatentAttentionBackward& params, int threads);
LATTE_EXPORT int64_t workspace_bytes(const LatentAttentionStep& params, int threads);

// `workspace` holds at least workspace_bytes(params, threads) bytes. threads >= 1.
LATTE_EXPORT void latent_attention_forward(const LatentAttentionForward& params, void* workspace,
                                           int threads);
LATTE_EXPORT void latent_attention_backward(const LatentAttentionBackward& params, void* workspace,
                                            int threads);
LATTE_EXPORT void latent_attention_step(const LatentAttentionStep& params, void* workspace,
                                        int threads);
LATTE_EXPORT void state_merge(const StateMerge& params);

LATTE_EXPORT const char* version();
// The instruction set of the kernels in use: "baseline", "x86-64-v3", "x86-64-v4" or "neon".
// Chosen once per process; the environment variable LATTE_CPU_ISA overrides the choice.
LATTE_EXPORT const char* cpu_isa();
LATTE_EXPORT bool cuda_built();

// Float32 multiply-adds per second, two operations each, that `threads` threads reach in registers
// with that instruction set, measured for `seconds`: the yardstick of the benchmarks. Each thread
// is timed by its own CPU time, so that other processes do not lower it.
LATTE_EXPORT double fma_rate(int threads, double seconds);

}  // namespace latte
