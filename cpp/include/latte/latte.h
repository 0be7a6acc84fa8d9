// SPDX-License-Identifier: Apache-2.0
/// @file
/// Latent attention (Latte, arXiv 2402.17512): y_t = sum_l p(l|t) E[v | l, s <= t].
///
/// Notation, used in every file: B batch, T tokens, H query heads, Hk key/value heads (H a multiple
/// of Hk), L latents per head, D value channels per head, N sequences (B, or len(cu_seqlens) - 1
/// when sequences are packed). Of windows: Dk key channels per head, S keys, W slots of a ring.
///
/// The library knows no torch and no Python and allocates nothing: tensors, states and workspace
/// belong to the caller. Every function checks its arguments once and throws latte::Error.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "latte/export.h"

namespace latte {

/// The type of a tensor's elements. A boolean is one byte, 0 or 1.
enum class DType : int32_t { float32, float64, bfloat16, float16, boolean, int32, int64 };

/// A view of the caller's memory.
struct Tensor {
  void* data = nullptr;              ///< null means "absent" where a field is optional
  DType dtype = DType::float32;      ///< type of the elements
  int64_t rank = 0;                  ///< 0 to 4, how many of the sizes below count
  int64_t shape[4] = {0, 0, 0, 0};   ///< sizes
  int64_t stride[4] = {0, 0, 0, 0};  ///< in elements; zero (expanded) or negative ones are fine
};

/// The summary of a set of tokens per head and latent (reference.py defines it in Python).
/// float64 if q, k and v are float64, float32 otherwise.
struct State {
  Tensor max;   ///< (N,Hk,L) max_s k_s, -inf for the empty set
  Tensor norm;  ///< (N,Hk,L) sum_s exp(k_s - max)
  Tensor mean;  ///< (N,Hk,L,D) sum_s softmax(k)_s v_s
};

/// Latent attention over whole sequences, causal or bidirectional. With p(l|t) the softmax over
/// latents of scale q_t and p(s|l) the one over tokens of scale k_l: y_t = sum_l p(l|t) sum_s
/// p(s|l) v_s, where s runs over tokens up to t (causal) or all of them.
struct LatentAttentionForward {
  Tensor q;            ///< (B,H,T,L) logits of p(l|t)
  Tensor k;            ///< (B,Hk,T,L) logits of p(s|l)
  Tensor v;            ///< (B,Hk,T,D) values
  Tensor key_mask;     ///< optional (B,T) boolean, false = the token is absent from every E[v|l]
  Tensor cu_seqlens;   ///< optional (N+1,) int32 or int64, B == 1: ranges of N packed sequences
  State initial;       ///< optional, causal only: the state before the first token
  Tensor y;            ///< (B,H,T,D) output
  State final;         ///< optional: the state after the last; must not overlap `initial`
  bool causal = true;  ///< false: every token sees all of its sequence
  double scale = 1.0;  ///< multiplies the logits q and k
};

/// Vector-Jacobian product of LatentAttentionForward. A state's max is a constant reference: its
/// gradient flows through norm and mean, d_log_norm = norm * d_norm, and State::max is ignored in
/// `d_final` and `d_initial`.
struct LatentAttentionBackward {
  Tensor q;            ///< (B,H,T,L) as in the forward call
  Tensor k;            ///< (B,Hk,T,L) as in the forward call
  Tensor v;            ///< (B,Hk,T,D) as in the forward call
  Tensor key_mask;     ///< as in the forward call
  Tensor cu_seqlens;   ///< as in the forward call
  State initial;       ///< as in the forward call
  Tensor dy;           ///< (B,H,T,D) gradient of y
  Tensor d_log_sum;    ///< optional (B,H,T) compute type: that of log(sum_l exp(scale q))
  State d_final;       ///< optional: gradient of `final`
  Tensor dq;           ///< (B,H,T,L) output
  Tensor dk;           ///< (B,Hk,T,L) output
  Tensor dv;           ///< (B,Hk,T,D) output
  State d_initial;     ///< optional output, present only with `initial`
  bool causal = true;  ///< as in the forward call
  double scale = 1.0;  ///< as in the forward call
};

/// One token per sequence, state updated in place: constant time and memory.
struct LatentAttentionStep {
  Tensor q;            ///< (N,H,L) logits of p(l|t)
  Tensor k;            ///< (N,Hk,L) logits of p(s|l)
  Tensor v;            ///< (N,Hk,D) values
  State state;         ///< in and out
  Tensor y;            ///< (N,H,D) output
  double scale = 1.0;  ///< multiplies the logits q and k
};

/// out = a + b, the state of the union of two disjoint token sets.
struct StateMerge {
  State a;    ///< one set
  State b;    ///< the other
  State out;  ///< may be a or b itself
};

/// h[t] = a[t] h[t-1] + b[t], channel by channel; C channels.
struct LinearRecurrenceForward {
  Tensor a;              ///< (B,T,C) factors
  Tensor b;              ///< (B,T,C) summands
  Tensor cu_seqlens;     ///< optional (N+1,), as above
  Tensor initial;        ///< optional (N,C), h before the first; float64 if a and b are, or float32
  Tensor h;              ///< (B,T,C) output in b's type, or in that of `initial`
  Tensor final;          ///< optional (N,C) output, the last h; must not overlap `initial`
  bool reverse = false;  ///< from the last token to the first: h[t] = a[t] h[t+1] + b[t]
};

/// Vector-Jacobian product of LinearRecurrenceForward.
struct LinearRecurrenceBackward {
  Tensor a;              ///< as in the forward call
  Tensor cu_seqlens;     ///< as in the forward call
  Tensor initial;        ///< as in the forward call
  Tensor h;              ///< the forward call's output, any floating-point type
  Tensor dh;             ///< (B,T,C) gradient of h
  Tensor d_final;        ///< optional (N,C), gradient of `final`
  Tensor da;             ///< (B,T,C) output in a's type
  Tensor db;             ///< (B,T,C) output in dh's type
  Tensor d_initial;      ///< optional (N,C) output, also without `initial`
  bool reverse = false;  ///< as in the forward call
};

/// The real-gated linear recurrent unit (Griffin, arXiv 2402.19427, section 2.4):
/// r = sigmoid(gate_a), i = sigmoid(gate_x), log a = -8 r softplus(log_lambda),
/// y[t] = a[t] y[t-1] + sqrt(1 - a[t]^2) i[t] x[t].
/// The square root is 1 at the first token of a sequence; its derivative is at most 1000.
struct RgLruForward {
  Tensor x;              ///< (B,T,C) input
  Tensor gate_a;         ///< (B,T,C) logits of the recurrence gate r
  Tensor gate_x;         ///< (B,T,C) logits of the input gate i
  Tensor log_lambda;     ///< (C,) decay rates
  Tensor key_mask;       ///< optional (B,T) boolean, false = the token is absent: y stays
  Tensor cu_seqlens;     ///< optional (N+1,), as above
  Tensor initial;        ///< optional (N,C), y before the first token: the sequence goes on
  Tensor fresh;          ///< optional (N,) boolean with `initial`, true: the sequence starts here
  Tensor y;              ///< (B,T,C) output in x's type, or in that of `initial`
  Tensor final;          ///< optional (N,C) output, the last y; `initial` itself if T == 1
  bool reverse = false;  ///< from the last token to the first
};

/// Vector-Jacobian product of RgLruForward.
struct RgLruBackward {
  Tensor x;              ///< as in the forward call
  Tensor gate_a;         ///< as in the forward call
  Tensor gate_x;         ///< as in the forward call
  Tensor log_lambda;     ///< as in the forward call
  Tensor key_mask;       ///< as in the forward call
  Tensor cu_seqlens;     ///< as in the forward call
  Tensor initial;        ///< as in the forward call
  Tensor fresh;          ///< as in the forward call
  Tensor y;              ///< the forward call's output, any floating-point type
  Tensor dy;             ///< (B,T,C) gradient of y
  Tensor d_final;        ///< optional (N,C), gradient of `final`
  Tensor dx;             ///< (B,T,C) output
  Tensor d_gate_a;       ///< (B,T,C) output
  Tensor d_gate_x;       ///< (B,T,C) output
  Tensor d_log_lambda;   ///< (C,) output
  Tensor d_initial;      ///< optional (N,C) output, also without `initial`
  bool reverse = false;  ///< as in the forward call
};

/// Depthwise convolution, y[t] = bias + sum over j < K of weight[:, j] x[t - left + j] with left =
/// K - 1 if causal, else (K - 1) / 2. Inputs outside of the sequence count as zero.
struct ShortConvForward {
  Tensor x;            ///< (B,T,C) input
  Tensor weight;       ///< (C,K), 1 <= K <= 8
  Tensor bias;         ///< optional (C,)
  Tensor cu_seqlens;   ///< optional (N+1,), as above
  Tensor initial;      ///< optional (N,K-1,C) in x's type, causal only: the inputs before the first
  Tensor y;            ///< (B,T,C) output
  Tensor final;        ///< optional (N,K-1,C) output, causal only: the last K - 1 inputs, oldest
                       ///< first; `initial` itself if T == 1
  bool causal = true;  ///< false: centred
};

/// Vector-Jacobian product of ShortConvForward.
struct ShortConvBackward {
  Tensor x;            ///< as in the forward call
  Tensor weight;       ///< as in the forward call
  Tensor cu_seqlens;   ///< as in the forward call
  Tensor initial;      ///< as in the forward call
  Tensor dy;           ///< (B,T,C) gradient of y
  Tensor d_final;      ///< optional (N,K-1,C), gradient of `final`
  Tensor dx;           ///< (B,T,C) output
  Tensor d_weight;     ///< (C,K) output
  Tensor d_bias;       ///< optional (C,) output
  Tensor d_initial;    ///< optional (N,K-1,C) output, also without `initial`
  bool causal = true;  ///< as in the forward call
};

/// Softmax attention of query t, which stands at key past + t of its sequence, to the keys closer
/// than `window`: p - window < s <= p, or |p - s| < window. A query that sees no key gives 0.
///
/// Optionally n sinks: keys and values with queries of their own, under the same softmax. A query
/// sees those whose sink_position its window does not hold (without positions: all), and stands at
/// position start + t of its sequence.
struct SlidingWindowForward {
  Tensor q;         ///< (B,H,T,Dk)
  Tensor k;         ///< (B,Hk,S,Dk), S = past + T; packed: N past + T, each past before its tokens
  Tensor v;         ///< (B,Hk,S,D)
  Tensor key_mask;  ///< optional (B,S) boolean, false = no query sees the key
  Tensor cu_seqlens;     ///< optional (N+1,), B == 1: ranges of the queries of N packed sequences
  Tensor q_sink;         ///< optional (B,H,T,Dk), queries for the sinks
  Tensor k_sink;         ///< with q_sink: (N,Hk,n,Dk)
  Tensor v_sink;         ///< with q_sink: (N,Hk,n,D)
  Tensor sink_position;  ///< optional (N,n) int64
  Tensor start;          ///< optional (N,) int64, 0 without
  Tensor y;              ///< (B,H,T,D) output
  Tensor log_sum;  ///< optional (B,H,T) output, compute type: log of the sum of exp of what is seen
  Tensor wide;     ///< optional (B,H,T,D) output, compute type: y unrounded
  int64_t window = 1;    ///< keys seen, to each side if not causal, the own one among them
  int64_t past = 0;      ///< keys of each sequence before its first query
  bool causal = true;    ///< false: both sides
  double scale = 1.0;    ///< multiplies q . k
  double softcap = 0.0;  ///< not 0: logits become softcap tanh(scale q . k / softcap)
};

/// Vector-Jacobian product of SlidingWindowForward, whose log_sum and unrounded y it takes.
struct SlidingWindowBackward {
  Tensor q;              ///< as in the forward call
  Tensor k;              ///< as in the forward call
  Tensor v;              ///< as in the forward call
  Tensor key_mask;       ///< as in the forward call
  Tensor cu_seqlens;     ///< as in the forward call
  Tensor q_sink;         ///< as in the forward call
  Tensor k_sink;         ///< as in the forward call
  Tensor v_sink;         ///< as in the forward call
  Tensor sink_position;  ///< as in the forward call
  Tensor start;          ///< as in the forward call
  Tensor log_sum;        ///< from the forward call
  Tensor wide;           ///< from the forward call; y itself if that is not half precision
  Tensor dy;             ///< (B,H,T,D) gradient of y
  Tensor d_log_sum;      ///< optional (B,H,T) compute type
  Tensor dq;             ///< (B,H,T,Dk) output
  Tensor dk;             ///< (B,Hk,S,Dk) output
  Tensor dv;             ///< (B,Hk,S,D) output
  Tensor dq_sink;        ///< with sinks: output in q_sink's shape
  Tensor dk_sink;        ///< with sinks: output in k_sink's shape
  Tensor dv_sink;        ///< with sinks: output in v_sink's shape
  int64_t window = 1;    ///< as in the forward call
  int64_t past = 0;      ///< as in the forward call
  bool causal = true;    ///< as in the forward call
  double scale = 1.0;    ///< as in the forward call
  double softcap = 0.0;  ///< as in the forward call
};

/// The last W keys and values of N sequences: token s of a sequence lies in slot s % W.
struct WindowRing {
  Tensor key;       ///< (N,Hk,W,Dk)
  Tensor value;     ///< (N,Hk,W,D)
  Tensor valid;     ///< (N,W) boolean: the slot holds a key that may be seen
  Tensor position;  ///< (N,) int64: tokens so far
};

/// One token per sequence with window W, ring updated in place: constant time and memory.
struct SlidingWindowStep {
  Tensor q;              ///< (N,H,Dk)
  Tensor k;              ///< (N,Hk,Dk)
  Tensor v;              ///< (N,Hk,D)
  WindowRing ring;       ///< in and out
  Tensor q_sink;         ///< optional (N,H,Dk), as in SlidingWindowForward
  Tensor k_sink;         ///< with q_sink: (N,Hk,n,Dk)
  Tensor v_sink;         ///< with q_sink: (N,Hk,n,D)
  Tensor sink_position;  ///< with q_sink: (N,n) int64
  Tensor y;              ///< (N,H,D) output
  double scale = 1.0;    ///< multiplies q . k
  double softcap = 0.0;  ///< as in SlidingWindowForward
};

/// A window and latents in one probability (Latte Macchiato): with p the softmax of q_latent,
/// y_t = p(0|t) window_t + sum_(l>=1) p(l|t) E[v | l, s <= t].
struct MacchiatoForward {
  Tensor q_latent;  ///< (B,H,T,1+L) compute type, column 0 for the window; L may be 0
  /// k (B,Hl,T,L) and v (B,Hl,T,D) of the latents, Hl a multiple of Hk that divides H, their state,
  /// mask, `scale` of q_latent and k; q is not looked at. y (B,H,T,D) in the compute type receives
  /// the unrounded sum.
  LatentAttentionForward latent;
  /// y receives the sum; it may be latent.y itself. `wide`: the window's part alone.
  SlidingWindowForward window;
};

/// Vector-Jacobian product of MacchiatoForward.
struct MacchiatoBackward {
  Tensor q_latent;                 ///< as in the forward call
  Tensor y;                        ///< latent.y of the forward call
  LatentAttentionBackward latent;  ///< dy and dq are not looked at; dk, dv of k and v
  SlidingWindowBackward window;    ///< dy of the sum
  Tensor dq_latent;                ///< (B,H,T,1+L) output
  /// Latents and window share one v: window.dv receives both parts and latent.dv, in the compute
  /// type, is scratch. The two may be one tensor.
  bool one_value = false;
};

/// One token per sequence of MacchiatoForward, state and ring updated in place.
struct MacchiatoStep {
  Tensor q_latent;             ///< (N,H,1+L) compute type
  LatentAttentionStep latent;  ///< k (N,Hl,L), v (N,Hl,D), state, scale; q, y are not looked at
  SlidingWindowStep window;    ///< its y receives the sum
};

/// Pair i of the first `dim` channels, turned by the angle position * rate of i: rotary embeddings
/// (arXiv 2104.09864). The gradient of x is dy rotated by the inverse. Angles are float64.
struct Rotate {
  Tensor x;                  ///< (B,H,T,D)
  Tensor position;           ///< (T,) or (B,T) int64
  Tensor rates;              ///< optional (dim/2,) float32 or float64, instead of base^(-2i/dim)
  Tensor y;                  ///< (B,H,T,D) output in x's type; it may be x itself
  double base = 10000.0;     ///< of the rates, where there are none
  int64_t dim = 0;           ///< even, at most D; the other channels are copied
  bool interleaved = false;  ///< pairs are channels (2i, 2i + 1) instead of (i, i + dim/2)
  bool inverse = false;      ///< by the negative angle
};

/// What every function throws: `what()` names the operator in brackets, what it got and what it
/// expected.
class LATTE_EXPORT Error : public std::runtime_error {
 public:
  /// A shape, size or combination; a dtype; anything else.
  enum class Kind { value, type, runtime };
  /// With that kind and that message.
  Error(Kind kind, const std::string& what) : std::runtime_error(what), kind(kind) {}
  Kind kind;  ///< what Python raises as ValueError, TypeError or RuntimeError
};

/// Workspace that the same call needs with that many threads, in bytes (64-byte alignment is
/// arranged inside). Validates the parameters.
/// @{
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
/// @}

/// Computes what its structure describes. `workspace` holds at least workspace_bytes(params,
/// threads) bytes, threads >= 1.
/// @{
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
/// @}

/// Such as "0.1.0".
LATTE_EXPORT const char* version();
/// The instruction set of the kernels in use: "baseline", "x86-64-v3", "x86-64-v4" or "neon".
/// Chosen once per process; the environment variable LATTE_CPU_ISA overrides the choice.
LATTE_EXPORT const char* cpu_isa();
/// Whether latte/cuda.h has kernels in this build.
LATTE_EXPORT bool cuda_built();

/// Float32 multiply-adds per second, two operations each, that `threads` threads reach in registers
/// with that instruction set, measured for `seconds`: the yardstick of the benchmarks. Each thread
/// is timed by its own CPU time, so that other processes do not lower it.
LATTE_EXPORT double fma_rate(int threads, double seconds);

}  // namespace latte
