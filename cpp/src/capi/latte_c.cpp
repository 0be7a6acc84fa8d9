// SPDX-License-Identifier: Apache-2.0
// latte_c.h over latte.h: the structures have one layout, which is checked field by field below, so
// that a call copies bytes and catches exceptions, and decides nothing.
#include "latte/latte_c.h"

#include <bit>
#include <cstddef>
#include <cstdio>
#include <exception>
#include <string>

#include "latte/latte.h"

namespace {

// Fixed memory: reporting an error must not fail for want of memory.
thread_local char last_error[1024] = "";

latte_status fail(latte_status status, const char* message) {
  std::snprintf(last_error, sizeof last_error, "%s", message);
  return status;
}

latte_status status_of(latte::Error::Kind kind) {
  switch (kind) {
    case latte::Error::Kind::value:
      return LATTE_VALUE_ERROR;
    case latte::Error::Kind::type:
      return LATTE_TYPE_ERROR;
    case latte::Error::Kind::runtime:
      return LATTE_RUNTIME_ERROR;
  }
  return LATTE_RUNTIME_ERROR;
}

template <class Body>
latte_status guarded(Body body) noexcept {
  try {
    body();
    return LATTE_OK;
  } catch (const latte::Error& error) {
    return fail(status_of(error.kind), error.what());
  } catch (const std::exception& error) {
    return fail(LATTE_RUNTIME_ERROR, error.what());
  } catch (...) {
    return fail(LATTE_RUNTIME_ERROR, "[latte_ext] unknown exception");
  }
}

[[noreturn]] void refuse(const char* op, const std::string& text) {
  throw latte::Error(latte::Error::Kind::value, "[" + std::string(op) + "] " + text);
}

template <class Cpp, class C>
Cpp converted(const char* op, const C* args) {
  if (!args) refuse(op, "args is NULL, expected a structure");
  return std::bit_cast<Cpp>(*args);
}

template <class Cpp, class C>
latte_status initialise(const char* op, C* args, size_t size) {
  return guarded([&] {
    if (!args) refuse(op, "args is NULL, expected a structure");
    if (size != sizeof *args)
      refuse(op, "args has " + std::to_string(size) + " bytes, expected " +
                     std::to_string(sizeof *args) + " as in version " + latte::version());
    *args = std::bit_cast<C>(Cpp{});
  });
}

template <class Cpp, class C>
latte_status workspace_of(const char* op, const C* args, int threads, int64_t* bytes) {
  return guarded([&] {
    if (!bytes) refuse(op, "bytes is NULL, expected a pointer to an int64_t");
    *bytes = latte::workspace_bytes(converted<Cpp>(op, args), threads);
  });
}

template <class Cpp, class C>
latte_status call(const char* op, void (*run)(const Cpp&, void*, int), const C* args,
                  void* workspace, int64_t bytes, int threads) {
  return guarded([&] {
    const Cpp params = converted<Cpp>(op, args);
    const int64_t needed = latte::workspace_bytes(params, threads);
    if (bytes < needed)
      refuse(op, "workspace has " + std::to_string(bytes) + " bytes, expected at least " +
                     std::to_string(needed));
    run(params, workspace, threads);
  });
}

}  // namespace

// LATTE_SAME(Cpp, C, field, ...): every field at one offset and of one size in both structures.
#define LATTE_SAME_FIELD(Cpp, C, field)                              \
  static_assert(offsetof(latte::Cpp, field) == offsetof(C, field) && \
                sizeof(latte::Cpp::field) == sizeof(C::field));
#define LATTE_EXPAND(...) LATTE_EXPAND3(LATTE_EXPAND3(LATTE_EXPAND3(__VA_ARGS__)))
#define LATTE_EXPAND3(...) LATTE_EXPAND2(LATTE_EXPAND2(LATTE_EXPAND2(__VA_ARGS__)))
#define LATTE_EXPAND2(...) LATTE_EXPAND1(LATTE_EXPAND1(LATTE_EXPAND1(__VA_ARGS__)))
#define LATTE_EXPAND1(...) __VA_ARGS__
#define LATTE_PARENTHESES ()
#define LATTE_NEXT_FIELD() LATTE_SAME_FIELDS
#define LATTE_SAME_FIELDS(Cpp, C, field, ...) \
  LATTE_SAME_FIELD(Cpp, C, field)             \
  __VA_OPT__(LATTE_NEXT_FIELD LATTE_PARENTHESES(Cpp, C, __VA_ARGS__))
#define LATTE_SAME(Cpp, C, ...)                   \
  static_assert(sizeof(latte::Cpp) == sizeof(C)); \
  LATTE_EXPAND(LATTE_SAME_FIELDS(Cpp, C, __VA_ARGS__))

#define LATTE_DEFINE_INIT(X, Cpp)                                              \
  latte_status latte_##X##_init(latte_##X##_args* args, size_t size_of_args) { \
    return initialise<latte::Cpp>(#X, args, size_of_args);                     \
  }
#define LATTE_DEFINE_OPERATOR(X, Cpp, ...)                                                        \
  LATTE_SAME(Cpp, latte_##X##_args, __VA_ARGS__)                                                  \
  LATTE_DEFINE_INIT(X, Cpp)                                                                       \
  latte_status latte_##X##_workspace(const latte_##X##_args* args, int threads, int64_t* bytes) { \
    return workspace_of<latte::Cpp>(#X, args, threads, bytes);                                    \
  }                                                                                               \
  latte_status latte_##X(const latte_##X##_args* args, void* workspace, int64_t workspace_bytes,  \
                         int threads) {                                                           \
    return call<latte::Cpp>(#X, latte::X, args, workspace, workspace_bytes, threads);             \
  }

extern "C" {

LATTE_SAME(Tensor, latte_tensor, data, dtype, rank, shape, stride)
LATTE_SAME(State, latte_state, max, norm, mean)
LATTE_SAME(WindowRing, latte_window_ring, key, value, valid, position)
static_assert(static_cast<int>(latte::DType::float32) == LATTE_FLOAT32 &&
              static_cast<int>(latte::DType::float64) == LATTE_FLOAT64 &&
              static_cast<int>(latte::DType::bfloat16) == LATTE_BFLOAT16 &&
              static_cast<int>(latte::DType::float16) == LATTE_FLOAT16 &&
              static_cast<int>(latte::DType::boolean) == LATTE_BOOLEAN &&
              static_cast<int>(latte::DType::int32) == LATTE_INT32 &&
              static_cast<int>(latte::DType::int64) == LATTE_INT64);

LATTE_DEFINE_OPERATOR(latent_attention_forward, LatentAttentionForward, q, k, v, key_mask,
                      cu_seqlens, initial, y, final, causal, scale)
LATTE_DEFINE_OPERATOR(latent_attention_backward, LatentAttentionBackward, q, k, v, key_mask,
                      cu_seqlens, initial, dy, d_log_sum, d_final, dq, dk, dv, d_initial, causal,
                      scale)
LATTE_DEFINE_OPERATOR(latent_attention_step, LatentAttentionStep, q, k, v, state, y, scale)
LATTE_DEFINE_OPERATOR(linear_recurrence_forward, LinearRecurrenceForward, a, b, cu_seqlens, initial,
                      h, final, reverse)
LATTE_DEFINE_OPERATOR(linear_recurrence_backward, LinearRecurrenceBackward, a, cu_seqlens, initial,
                      h, dh, d_final, da, db, d_initial, reverse)
LATTE_DEFINE_OPERATOR(rg_lru_forward, RgLruForward, x, gate_a, gate_x, log_lambda, key_mask,
                      cu_seqlens, initial, fresh, y, final, reverse)
LATTE_DEFINE_OPERATOR(rg_lru_backward, RgLruBackward, x, gate_a, gate_x, log_lambda, key_mask,
                      cu_seqlens, initial, fresh, y, dy, d_final, dx, d_gate_a, d_gate_x,
                      d_log_lambda, d_initial, reverse)
LATTE_DEFINE_OPERATOR(short_conv_forward, ShortConvForward, x, weight, bias, cu_seqlens, initial, y,
                      final, causal)
LATTE_DEFINE_OPERATOR(short_conv_backward, ShortConvBackward, x, weight, cu_seqlens, initial, dy,
                      d_final, dx, d_weight, d_bias, d_initial, causal)
LATTE_DEFINE_OPERATOR(sliding_window_forward, SlidingWindowForward, q, k, v, key_mask, cu_seqlens,
                      q_sink, k_sink, v_sink, sink_position, start, y, log_sum, wide, window, past,
                      causal, scale, softcap)
LATTE_DEFINE_OPERATOR(sliding_window_backward, SlidingWindowBackward, q, k, v, key_mask, cu_seqlens,
                      q_sink, k_sink, v_sink, sink_position, start, log_sum, wide, dy, d_log_sum,
                      dq, dk, dv, dq_sink, dk_sink, dv_sink, window, past, causal, scale, softcap)
LATTE_DEFINE_OPERATOR(sliding_window_step, SlidingWindowStep, q, k, v, ring, q_sink, k_sink, v_sink,
                      sink_position, y, scale, softcap)
LATTE_DEFINE_OPERATOR(macchiato_forward, MacchiatoForward, q_latent, latent, window)
LATTE_DEFINE_OPERATOR(macchiato_backward, MacchiatoBackward, q_latent, y, latent, window, dq_latent,
                      one_value)
LATTE_DEFINE_OPERATOR(macchiato_step, MacchiatoStep, q_latent, latent, window)
LATTE_DEFINE_OPERATOR(rotate, Rotate, x, position, rates, y, base, dim, interleaved, inverse)

LATTE_SAME(StateMerge, latte_state_merge_args, a, b, out)
LATTE_DEFINE_INIT(state_merge, StateMerge)
latte_status latte_state_merge(const latte_state_merge_args* args) {
  const char* const op = "state_merge";
  return guarded([&] { latte::state_merge(converted<latte::StateMerge>(op, args)); });
}

latte_tensor latte_dense(void* data, int32_t dtype, int64_t rank, const int64_t* shape) {
  latte_tensor tensor = {data, dtype, rank, {0, 0, 0, 0}, {0, 0, 0, 0}};
  int64_t stride = 1;
  for (int64_t i = rank < 4 ? rank - 1 : 3; i >= 0; --i) {
    tensor.shape[i] = shape[i];
    tensor.stride[i] = stride;
    stride *= shape[i];
  }
  return tensor;
}

const char* latte_last_error(void) { return last_error; }

const char* latte_version(void) { return latte::version(); }

const char* latte_cpu_isa(void) {
  const char* isa = nullptr;
  guarded([&] { isa = latte::cpu_isa(); });
  return isa;
}

}  // extern "C"
