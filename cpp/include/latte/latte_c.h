/* SPDX-License-Identifier: Apache-2.0 */
/**
 * @file
 * The operators of latte.h for C and for every language that calls C.
 *
 * Each operator `X` of latte.h has a structure `latte_X_args` with the same fields in the same
 * order, which latte.h documents, and three functions:
 *
 *     latte_X_init(&args, sizeof args)             the defaults; all tensors absent
 *     latte_X_workspace(&args, threads, &bytes)    what the call needs
 *     latte_X(&args, workspace, bytes, threads)    the call
 *
 * Memory belongs to the caller; nothing is kept after a call. Calls from several threads at once
 * are safe as long as their outputs, states and workspaces are different memory.
 *
 * Every function returns LATTE_OK or what is wrong, and no C++ exception leaves it;
 * latte_last_error() has the message: the operator in brackets, what it got, what it expected.
 * Structures may grow before version 1.0: `_init` refuses a size that is not the library's.
 */
#ifndef LATTE_LATTE_C_H_
#define LATTE_LATTE_C_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "latte/export.h"

#ifdef __cplusplus
extern "C" {
#endif

/** What a call returns. */
typedef enum latte_status {
  LATTE_OK = 0,
  LATTE_VALUE_ERROR = 1,  /**< a shape, a size or a combination */
  LATTE_TYPE_ERROR = 2,   /**< a dtype */
  LATTE_RUNTIME_ERROR = 3 /**< anything else */
} latte_status;

/** Element types, numbered as latte::DType. A boolean is one byte, 0 or 1. */
enum {
  LATTE_FLOAT32 = 0,
  LATTE_FLOAT64 = 1,
  LATTE_BFLOAT16 = 2,
  LATTE_FLOAT16 = 3,
  LATTE_BOOLEAN = 4,
  LATTE_INT32 = 5,
  LATTE_INT64 = 6
};

/** A view of the caller's memory: latte::Tensor. Strides count elements; all zero: absent. */
typedef struct latte_tensor {
  void* data;
  int32_t dtype;
  int64_t rank;
  int64_t shape[4];
  int64_t stride[4];
} latte_tensor;

/** latte::State: max and norm (N,Hk,L), mean (N,Hk,L,D). */
typedef struct latte_state {
  latte_tensor max, norm, mean;
} latte_state;

/** latte::WindowRing. */
typedef struct latte_window_ring {
  latte_tensor key, value, valid, position;
} latte_window_ring;

/** latte::LatentAttentionForward. Defaults: causal, scale 1. */
typedef struct latte_latent_attention_forward_args {
  latte_tensor q, k, v, key_mask, cu_seqlens;
  latte_state initial;
  latte_tensor y;
  latte_state final;
  bool causal;
  double scale;
} latte_latent_attention_forward_args;

/** latte::LatentAttentionBackward. Defaults: causal, scale 1. */
typedef struct latte_latent_attention_backward_args {
  latte_tensor q, k, v, key_mask, cu_seqlens;
  latte_state initial;
  latte_tensor dy, d_log_sum;
  latte_state d_final;
  latte_tensor dq, dk, dv;
  latte_state d_initial;
  bool causal;
  double scale;
} latte_latent_attention_backward_args;

/** latte::LatentAttentionStep. Default: scale 1. */
typedef struct latte_latent_attention_step_args {
  latte_tensor q, k, v;
  latte_state state;
  latte_tensor y;
  double scale;
} latte_latent_attention_step_args;

/** latte::LinearRecurrenceForward. */
typedef struct latte_linear_recurrence_forward_args {
  latte_tensor a, b, cu_seqlens, initial, h, final;
  bool reverse;
} latte_linear_recurrence_forward_args;

/** latte::LinearRecurrenceBackward. */
typedef struct latte_linear_recurrence_backward_args {
  latte_tensor a, cu_seqlens, initial, h, dh, d_final, da, db, d_initial;
  bool reverse;
} latte_linear_recurrence_backward_args;

/** latte::RgLruForward. */
typedef struct latte_rg_lru_forward_args {
  latte_tensor x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, initial, fresh, y, final;
  bool reverse;
} latte_rg_lru_forward_args;

/** latte::RgLruBackward. */
typedef struct latte_rg_lru_backward_args {
  latte_tensor x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, initial, fresh;
  latte_tensor y, dy, d_final, dx, d_gate_a, d_gate_x, d_log_lambda, d_initial;
  bool reverse;
} latte_rg_lru_backward_args;

/** latte::ShortConvForward. Default: causal. */
typedef struct latte_short_conv_forward_args {
  latte_tensor x, weight, bias, cu_seqlens, initial, y, final;
  bool causal;
} latte_short_conv_forward_args;

/** latte::ShortConvBackward. Default: causal. */
typedef struct latte_short_conv_backward_args {
  latte_tensor x, weight, cu_seqlens, initial, dy, d_final, dx, d_weight, d_bias, d_initial;
  bool causal;
} latte_short_conv_backward_args;

/** latte::SlidingWindowForward. Defaults: window 1, causal, scale 1. */
typedef struct latte_sliding_window_forward_args {
  latte_tensor q, k, v, key_mask, cu_seqlens, q_sink, k_sink, v_sink, sink_position, start;
  latte_tensor y, log_sum, wide;
  int64_t window, past;
  bool causal;
  double scale, softcap;
} latte_sliding_window_forward_args;

/** latte::SlidingWindowBackward. Defaults: window 1, causal, scale 1. */
typedef struct latte_sliding_window_backward_args {
  latte_tensor q, k, v, key_mask, cu_seqlens, q_sink, k_sink, v_sink, sink_position, start;
  latte_tensor log_sum, wide, dy, d_log_sum, dq, dk, dv, dq_sink, dk_sink, dv_sink;
  int64_t window, past;
  bool causal;
  double scale, softcap;
} latte_sliding_window_backward_args;

/** latte::SlidingWindowStep. Default: scale 1. */
typedef struct latte_sliding_window_step_args {
  latte_tensor q, k, v;
  latte_window_ring ring;
  latte_tensor q_sink, k_sink, v_sink, sink_position, y;
  double scale, softcap;
} latte_sliding_window_step_args;

/** latte::MacchiatoForward. Defaults: those of its parts. */
typedef struct latte_macchiato_forward_args {
  latte_tensor q_latent;
  latte_latent_attention_forward_args latent;
  latte_sliding_window_forward_args window;
} latte_macchiato_forward_args;

/** latte::MacchiatoBackward. Defaults: those of its parts. */
typedef struct latte_macchiato_backward_args {
  latte_tensor q_latent, y;
  latte_latent_attention_backward_args latent;
  latte_sliding_window_backward_args window;
  latte_tensor dq_latent;
  bool one_value;
} latte_macchiato_backward_args;

/** latte::MacchiatoStep. Defaults: those of its parts. */
typedef struct latte_macchiato_step_args {
  latte_tensor q_latent;
  latte_latent_attention_step_args latent;
  latte_sliding_window_step_args window;
} latte_macchiato_step_args;

/** latte::Rotate. Default: base 10,000. */
typedef struct latte_rotate_args {
  latte_tensor x, position, rates, y;
  double base;
  int64_t dim;
  bool interleaved, inverse;
} latte_rotate_args;

/** latte::StateMerge. It needs no workspace: latte_state_merge(&args). */
typedef struct latte_state_merge_args {
  latte_state a, b, out;
} latte_state_merge_args;

/** Declares latte_X_init, latte_X_workspace and latte_X, as described at the top of this file. */
#define LATTE_DECLARE_OPERATOR(X)                                                            \
  LATTE_EXPORT latte_status latte_##X##_init(latte_##X##_args* args, size_t size_of_args);   \
  LATTE_EXPORT latte_status latte_##X##_workspace(const latte_##X##_args* args, int threads, \
                                                  int64_t* bytes);                           \
  LATTE_EXPORT latte_status latte_##X(const latte_##X##_args* args, void* workspace,         \
                                      int64_t workspace_bytes, int threads)

LATTE_DECLARE_OPERATOR(latent_attention_forward);
LATTE_DECLARE_OPERATOR(latent_attention_backward);
LATTE_DECLARE_OPERATOR(latent_attention_step);
LATTE_DECLARE_OPERATOR(linear_recurrence_forward);
LATTE_DECLARE_OPERATOR(linear_recurrence_backward);
LATTE_DECLARE_OPERATOR(rg_lru_forward);
LATTE_DECLARE_OPERATOR(rg_lru_backward);
LATTE_DECLARE_OPERATOR(short_conv_forward);
LATTE_DECLARE_OPERATOR(short_conv_backward);
LATTE_DECLARE_OPERATOR(sliding_window_forward);
LATTE_DECLARE_OPERATOR(sliding_window_backward);
LATTE_DECLARE_OPERATOR(sliding_window_step);
LATTE_DECLARE_OPERATOR(macchiato_forward);
LATTE_DECLARE_OPERATOR(macchiato_backward);
LATTE_DECLARE_OPERATOR(macchiato_step);
LATTE_DECLARE_OPERATOR(rotate);

LATTE_EXPORT latte_status latte_state_merge_init(latte_state_merge_args* args, size_t size_of_args);
LATTE_EXPORT latte_status latte_state_merge(const latte_state_merge_args* args);

/**
 * A view of contiguous memory, the last dimension fastest. `rank`, 0 to 4, is the length of
 * `shape`; a longer one is kept, for the operator to refuse.
 */
LATTE_EXPORT latte_tensor latte_dense(void* data, int32_t dtype, int64_t rank,
                                      const int64_t* shape);

/** The message of this thread's last call that failed; "" if none has. Valid until the next one. */
LATTE_EXPORT const char* latte_last_error(void);

/** The library's version, such as "0.1.0". */
LATTE_EXPORT const char* latte_version(void);

/** The instruction set of the kernels in use; NULL, and an error, if LATTE_CPU_ISA names none. */
LATTE_EXPORT const char* latte_cpu_isa(void);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* LATTE_LATTE_C_H_ */
