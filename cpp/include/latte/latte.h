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

// h[t] = a[t] h[t-1] + b[t], channel by channel; C channels.
struct LinearRecurrenceForward {
  Tensor a, b;        // (B,T,C)
  Tensor cu_seqlens;  // optional, as above
  Tensor initial;  // optional (N,C), h before the first token; float64 if a and b are, or float32
  Tensor h;        // (B,T,C) in b's type, or in that of `initial`
  Tensor final;    // optional (N,C), the last h; must not overlap `initial`
  bool reverse = false;  // from the last token to the first: h[t] = a[t] h[t+1] + b[t]
};

struct LinearRecurrenceBackward {
  Tensor a, cu_seqlens, initial;  // as in the forward call
  Tensor h;                       // its output, any floating-point type
  Tensor dh;                      // (B,T,C)
  Tensor d_final;                 // optional (N,C)
  Tensor da, db;                  // (B,T,C) in the types of a and dh
  Tensor d_initial;               // optional (N,C), also without `initial`
  bool reverse = false;
};

// The real-gated linear recurrent unit (Griffin, arXiv 2402.19427, section 2.4):
//   r = sigmoid(gate_a)   i = sigmoid(gate_x)   log a = -8 r softplus(log_lambda)
//   y[t] = a[t] y[t-1] + sqrt(1 - a[t]^2) i[t] x[t]
// The square root is 1 at the first token of a sequence; its derivative is at most 1000.
struct RgLruForward {
  Tensor x, gate_a, gate_x;  // (B,T,C)
  Tensor log_lambda;         // (C,)
  Tensor key_mask;           // optional (B,T) boolean, false = the token is absent: y stays
  Tensor cu_seqlens;         // optional, as above
  Tensor initial;            // optional (N,C), y before the first token: the sequence goes on
  Tensor fresh;              // optional (N,) boolean with `initial`, true: the sequence starts here
  Tensor y;                  // (B,T,C) in x's type, or in that of `initial`
  Tensor final;              // optional (N,C), the last y; `initial` itself if T == 1
  bool reverse = false;
};

struct RgLruBackward {
  Tensor x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, initial, fresh;  // as above
  Tensor y;                       // the forward call's output, any floating-point type
  Tensor dy;                      // (B,T,C)
  Tensor d_final;                 // optional (N,C)
  Tensor dx, d_gate_a, d_gate_x;  // (B,T,C)
  Tensor d_log_lambda;            // (C,)
  Tensor d_initial;               // optional (N,C), also without `initial`
  bool reverse = false;
};

// Depthwise convolution, y[t] = bias + sum over j < K of weight[:, j] x[t - left + j] with left =
// K - 1 if causal, else (K - 1) / 2. Inputs outside of the sequence count as zero.
struct ShortConvForward {
  Tensor x;           // (B,T,C)
  Tensor weight;      // (C,K), 1 <= K <= 8
  Tensor bias;        // optional (C,)
  Tensor cu_seqlens;  // optional, as above
  Tensor initial;     // optional (N,K-1,C) in x's type, causal only: the inputs before the first
  Tensor y;           // (B,T,C)
  Tensor final;       // optional (N,K-1,C), causal only: the last K - 1 inputs, oldest first;
                      // `initial` itself if T == 1
  bool causal = true;
};

struct ShortConvBackward {
  Tensor x, weight, cu_seqlens, initial;  // as above
  Tensor dy;                              // (B,T,C)
  Tensor d_final;                         // optional (N,K-1,C)
  Tensor dx, d_weight;                    // shapes of x and weight
  Tensor d_bias;                          // optional (C,)
  Tensor d_initial;                       // optional (N,K-1,C), also without `initial`
  bool causal = true;
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
LATTE_EXPORT int64_t workspace_bytes(const LinearRecurrenceForward& params, int threads);
LATTE_EXPORT int64_t workspace_bytes(const LinearRecurrenceBackward& params, int threads);
LATTE_EXPORT int64_t workspace_bytes(const RgLruForward& params, int threads);
LATTE_EXPORT int64_t workspace_bytes(const RgLruBackward& params, int threads);
LATTE_EXPORT int64_t workspace_bytes(const ShortConvForward& params, int threads);
LATTE_EXPORT int64_t workspace_bytes(const ShortConvBackward& params, int threads);

// `workspace` holds at least workspace_bytes(params, threads) bytes. threads >= 1.
LATTE_EXPORT void latent_attention_forward(const LatentAttentionForward& params, void* workspace,
                                           int threads);
LATTE_EXPORT void latent_attention_backward(const LatentAttentionBackward& params, void* workspace,
                                            int threads);
LATTE_EXPORT void latent_attention_step(const LatentAttentionStep& params, void* workspace,
                                        int threads);
LATTE_EXPORT void linear_recurrence_forward(const LinearRecurrenceForward& params, void* workspace,
                                            int threads);
LATTE_EXPORT void linear_recurrence_backward(const LinearRecurrenceBackward& params,
                                             void* workspace, int threads);
LATTE_EXPORT void rg_lru_forward(const RgLruForward& params, void* workspace, int threads);
LATTE_EXPORT void rg_lru_backward(const RgLruBackward& params, void* workspace, int threads);
LATTE_EXPORT void short_conv_forward(const ShortConvForward& params, void* workspace, int threads);
LATTE_EXPORT void short_conv_backward(const ShortConvBackward& params, void* workspace,
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
