// SPDX-License-Identifier: Apache-2.0
// Latent attention (Latte, arXiv 2402.17512): y_t = sum_l p(l|t) E[v | l, s <= t].
//
// Notation, used in every file: B batch, T tokens, H query heads, Hk key/value heads (H a multiple
// of Hk), L latents per head, D value channels per head, N sequences (B, or len(cu_seqlens) - 1
// when sequences are packed). Of windows: Dk key channels per head, S keys, W slots of a ring.
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
  Tensor d_log_sum;   // optional (B,H,T) compute type: gradient of log(sum over l of exp(scale q))
  State d_final;      // optional
  Tensor dq, dk, dv;  // shapes of q, k, v
  State d_initial;    // optional, present only with `initial`
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

// Softmax attention of query t, which stands at key past + t of its sequence, to the keys closer
// than `window`: p - window < s <= p, or |p - s| < window. A query that sees no key gives 0.
struct SlidingWindowForward {
  Tensor q;           // (B,H,T,Dk)
  Tensor k;           // (B,Hk,S,Dk), S = past + T; packed: N past + T, each past before its tokens
  Tensor v;           // (B,Hk,S,D)
  Tensor key_mask;    // optional (B,S) boolean, false = no query sees the key
  Tensor cu_seqlens;  // optional (N+1,), B == 1: ranges of the queries of N packed sequences
  // Optional: n keys and values with queries of their own, under the same softmax. A query sees
  // those whose sink_position its window does not hold (without positions: all), and stands at
  // position start + t of its sequence.
  Tensor q_sink, k_sink, v_sink;  // (B,H,T,Dk), (N,Hk,n,Dk), (N,Hk,n,D)
  Tensor sink_position;           // optional (N,n) int64
  Tensor start;                   // optional (N,) int64, 0 without
  Tensor y;                       // (B,H,T,D)
  Tensor log_sum;  // optional (B,H,T) compute type: log of the sum of exp over what is seen
  Tensor wide;     // optional (B,H,T,D) compute type: y unrounded
  int64_t window = 1, past = 0;
  bool causal = true;
  double scale = 1.0;    // multiplies q . k
  double softcap = 0.0;  // not 0: logits become softcap tanh(scale q . k / softcap)
};

// Vector-Jacobian product of SlidingWindowForward, whose log_sum and unrounded y it takes.
struct SlidingWindowBackward {
  // As in the forward call.
  Tensor q, k, v, key_mask, cu_seqlens, q_sink, k_sink, v_sink, sink_position, start;
  Tensor log_sum, wide;              // from the forward call; wide is y if that is not half
  Tensor dy;                         // (B,H,T,D)
  Tensor d_log_sum;                  // optional (B,H,T) compute type
  Tensor dq, dk, dv;                 // shapes of q, k, v
  Tensor dq_sink, dk_sink, dv_sink;  // with sinks, in their shapes
  int64_t window = 1, past = 0;
  bool causal = true;
  double scale = 1.0, softcap = 0.0;
};

// The last W keys and values of N sequences: token s of a sequence lies in slot s % W.
struct WindowRing {
  Tensor key;       // (N,Hk,W,Dk)
  Tensor value;     // (N,Hk,W,D)
  Tensor valid;     // (N,W) boolean: the slot holds a key that may be seen
  Tensor position;  // (N,) int64: tokens so far
};

// One token per sequence with window W, ring updated in place: constant time and memory.
struct SlidingWindowStep {
  Tensor q;                       // (N,H,Dk)
  Tensor k;                       // (N,Hk,Dk)
  Tensor v;                       // (N,Hk,D)
  WindowRing ring;                // in and out
  Tensor q_sink, k_sink, v_sink;  // optional (N,H,Dk), (N,Hk,n,Dk), (N,Hk,n,D): as above
  Tensor sink_position;           // (N,n) int64
  Tensor y;                       // (N,H,D)
  double scale = 1.0, softcap = 0.0;
};

// A window and latents in one probability (Latte Macchiato): with p the softmax of q_latent,
//   y_t = p(0|t) window_t + sum_(l>=1) p(l|t) E[v | l, s <= t].
struct MacchiatoForward {
  Tensor q_latent;  // (B,H,T,1+L) compute type, column 0 for the window; L may be 0
  // k (B,Hl,T,L) and v (B,Hl,T,D) of the latents, Hl a multiple of Hk that divides H, their state,
  // mask, `scale` of q_latent and k; q is not looked at. y (B,H,T,D) in the compute type receives
  // the unrounded sum.
  LatentAttentionForward latent;
  // y receives the sum; it may be latent.y itself. `wide`: the window's part alone.
  SlidingWindowForward window;
};

struct MacchiatoBackward {
  Tensor q_latent;
  Tensor y;                        // latent.y of the forward call
  LatentAttentionBackward latent;  // dy and dq are not looked at; dk, dv of k and v
  SlidingWindowBackward window;    // dy of the sum
  Tensor dq_latent;
  // Latents and window share one v: window.dv receives both parts and latent.dv, in the compute
  // type, is scratch. The two may be one tensor.
  bool one_value = false;
};

struct MacchiatoStep {
  Tensor q_latent;             // (N,H,1+L) compute type
  LatentAttentionStep latent;  // k (N,Hl,L), v (N,Hl,D), state, scale; q and y are not looked at
  SlidingWindowStep window;
};

// Pair i of the first `dim` channels, turned by the angle position * rate of i: rotary embeddings
// (arXiv 2104.09864). The gradient of x is dy rotated by the inverse. Angles are float64.
struct Rotate {
  Tensor x;         // (B,H,T,D)
  Tensor position;  // (T,) or (B,T) int64
  Tensor rates;     // optional (dim/2,) float32 or float64, instead of base^(-2i/dim)
  Tensor y;         // (B,H,T,D) in x's type; it may be x itself
  double base = 10000.0;
  int64_t dim = 0;           // even, at most D; the other channels are copied
  bool interleaved = false;  // pairs are channels (2i, 2i + 1) instead of (i, i + dim/2)
  bool inverse = false;      // by the negative angle
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
LATTE_EXPORT int64_t workspace_bytes(const SlidingWindowForward& params, int threads);
LATTE_EXPORT int64_t workspace_bytes(const SlidingWindowBackward& params, int threads);
LATTE_EXPORT int64_t workspace_bytes(const SlidingWindowStep& params, int threads);
LATTE_EXPORT int64_t workspace_bytes(const MacchiatoForward& params, int threads);
LATTE_EXPORT int64_t workspace_bytes(const MacchiatoBackward& params, int threads);
LATTE_EXPORT int64_t workspace_bytes(const MacchiatoStep& params, int threads);
LATTE_EXPORT int64_t workspace_bytes(const Rotate& params, int threads);

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
LATTE_EXPORT void sliding_window_forward(const SlidingWindowForward& params, void* workspace,
                                         int threads);
LATTE_EXPORT void sliding_window_backward(const SlidingWindowBackward& params, void* workspace,
                                          int threads);
LATTE_EXPORT void sliding_window_step(const SlidingWindowStep& params, void* workspace,
                                      int threads);
LATTE_EXPORT void macchiato_forward(const MacchiatoForward& params, void* workspace, int threads);
LATTE_EXPORT void macchiato_backward(const MacchiatoBackward& params, void* workspace, int threads);
LATTE_EXPORT void macchiato_step(const MacchiatoStep& params, void* workspace, int threads);
LATTE_EXPORT void rotate(const Rotate& params, void* workspace, int threads);

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
