// SPDX-License-Identifier: Apache-2.0
// Operators of recurrences and convolutions.
//
// A backward pass needs h of every token. It is the forward pass's output where that has the type
// of the arithmetic; half-precision outputs are rounded, so there h is computed again.
#pragma once

#include "common/element_size.h"
#include "host.h"

namespace latte::operators {

// (B,T,C), or (N,C) as N sequences of one token.
inline Tensor as_tokens(Tensor t) {
  if (t.rank != 2) return t;
  t.rank = 3;
  t.shape[2] = t.shape[1];
  t.stride[2] = t.stride[1];
  t.shape[1] = 1;
  t.stride[1] = t.shape[2] * t.stride[2];
  return t;
}

// Whether elements of two tensors may share memory.
inline bool overlap(const Tensor& a, const Tensor& b) {
  const auto range = [](const Tensor& t) {
    const auto* low = static_cast<const char*>(t.data);
    const auto* high = low;
    for (int64_t i = 0; i < t.rank && i < 4; ++i) {
      if (t.shape[i] == 0) return std::pair{low, low};
      const int64_t reach = (t.shape[i] - 1) * t.stride[i] * element_size(t.dtype);
      (reach < 0 ? low : high) += reach;
    }
    return std::pair{low, high + element_size(t.dtype)};
  };
  const auto [a_low, a_high] = range(a);
  const auto [b_low, b_high] = range(b);
  return a_low < b_high && b_low < a_high;
}

// A call of the core under the name of the step.
template <class Function>
void as_step(const char* op, const Function& function) {
  try {
    function();
  } catch (const Error& error) {
    std::string what = error.what();
    const std::string prefix = "[" + std::string(op) + "]";
    if (what.rfind(prefix, 0) == 0) what.insert(prefix.size() - 1, "_step");
    throw Error(error.kind, what);
  }
}

struct LinearRecurrence {
  static constexpr const char* schema =
      "linear_recurrence(Tensor a, Tensor b, Tensor? cu_seqlens, Tensor? h0, bool reverse)"
      " -> (Tensor h, Tensor final)";

  template <class H>
  static std::tuple<Out<H>, Out<H>> run(H& host, In<H> a, In<H> b, Maybe<H> cu_seqlens, Maybe<H> h0,
                                        bool reverse) {
    const char* const op = "linear_recurrence";
    LinearRecurrenceForward p;
    p.a = host.view(a);
    p.b = host.view(b);
    p.cu_seqlens = host.view(cu_seqlens);
    p.initial = host.view(h0);
    check_rank(op, 3, {{"a", p.a}, {"b", p.b}});
    const int64_t sequences = count_sequences(op, p.b, p.cu_seqlens);
    Out<H> h = like(host, b);
    Out<H> last = host.extra(b, wide_type(p.b), {sequences, p.b.shape[2]});
    p.h = host.view(h);
    p.final = host.view(last);
    p.reverse = reverse;
    host.call(linear_recurrence_forward, cuda::linear_recurrence_forward, p);
    return {h, last};
  }
};

struct LinearRecurrenceGradient {
  static constexpr const char* schema =
      "linear_recurrence_backward(Tensor a, Tensor? b, Tensor? h, Tensor? cu_seqlens, Tensor? h0, "
      "Tensor dh, Tensor d_final, bool reverse) -> (Tensor da, Tensor db, Tensor d_h0)";

  template <class H>
  static std::tuple<Out<H>, Out<H>, Out<H>> run(H& host, In<H> a, Maybe<H> b, Maybe<H> h,
                                                Maybe<H> cu_seqlens, Maybe<H> h0, In<H> dh,
                                                In<H> d_final, bool reverse) {
    Out<H> da = like(host, a), db = like(host, dh), d_h0 = like_or_nothing(host, h0, d_final);
    LinearRecurrenceBackward p;
    p.a = host.view(a);
    p.h = host.view(h);
    p.cu_seqlens = host.view(cu_seqlens);
    p.initial = host.view(h0);
    p.reverse = reverse;
    LinearRecurrenceForward again;
    again.b = host.view(b);
    std::optional<Out<H>> computed;
    if (given(again.b)) {
      computed = host.scratch(a, wide_type(again.b), sizes(again.b));
      again.a = p.a;
      again.cu_seqlens = p.cu_seqlens;
      again.initial = p.initial;
      again.h = p.h = host.view(*computed);
      again.reverse = reverse;
      host.call(linear_recurrence_forward, cuda::linear_recurrence_forward, again);
    }
    p.dh = host.view(dh);
    p.d_final = host.view(d_final);
    p.da = host.view(da);
    p.db = host.view(db);
    p.d_initial = if_given(host, h0, d_h0);
    host.call(linear_recurrence_backward, cuda::linear_recurrence_backward, p);
    return {da, db, d_h0};
  }
};

inline RgLruForward rg_lru_inputs(const Tensor& x, const Tensor& gate_a, const Tensor& gate_x,
                                  const Tensor& log_lambda, const Tensor& key_mask,
                                  const Tensor& cu_seqlens, const Tensor& initial,
                                  const Tensor& fresh, bool reverse) {
  RgLruForward p;
  p.x = x;
  p.gate_a = gate_a;
  p.gate_x = gate_x;
  p.log_lambda = log_lambda;
  p.key_mask = key_mask;
  p.cu_seqlens = cu_seqlens;
  p.initial = initial;
  p.fresh = fresh;
  p.reverse = reverse;
  return p;
}

struct GatedRecurrence {
  static constexpr const char* schema =
      "rg_lru(Tensor x, Tensor gate_a, Tensor gate_x, Tensor log_lambda, Tensor? key_mask, "
      "Tensor? cu_seqlens, Tensor? h0, Tensor? fresh, bool reverse) -> (Tensor y, Tensor final)";

  template <class H>
  static std::tuple<Out<H>, Out<H>> run(H& host, In<H> x, In<H> gate_a, In<H> gate_x,
                                        In<H> log_lambda, Maybe<H> key_mask, Maybe<H> cu_seqlens,
                                        Maybe<H> h0, Maybe<H> fresh, bool reverse) {
    const char* const op = "rg_lru";
    RgLruForward p = rg_lru_inputs(host.view(x), host.view(gate_a), host.view(gate_x),
                                   host.view(log_lambda), host.view(key_mask),
                                   host.view(cu_seqlens), host.view(h0), host.view(fresh), reverse);
    check_rank(op, 3, {{"x", p.x}, {"gate_a", p.gate_a}, {"gate_x", p.gate_x}});
    const int64_t sequences = count_sequences(op, p.x, p.cu_seqlens);
    Out<H> y = like(host, x);
    Out<H> last = host.extra(x, wide_type(p.x), {sequences, p.x.shape[2]});
    p.y = host.view(y);
    p.final = host.view(last);
    host.call(rg_lru_forward, cuda::rg_lru_forward, p);
    return {y, last};
  }
};

struct GatedRecurrenceGradient {
  static constexpr const char* schema =
      "rg_lru_backward(Tensor x, Tensor gate_a, Tensor gate_x, Tensor log_lambda, "
      "Tensor? key_mask, Tensor? cu_seqlens, Tensor? h0, Tensor? fresh, Tensor? y, Tensor dy, "
      "Tensor d_final, bool reverse)"
      " -> (Tensor dx, Tensor d_gate_a, Tensor d_gate_x, Tensor d_log_lambda, Tensor d_h0)";

  template <class H>
  static std::tuple<Out<H>, Out<H>, Out<H>, Out<H>, Out<H>> run(
      H& host, In<H> x, In<H> gate_a, In<H> gate_x, In<H> log_lambda, Maybe<H> key_mask,
      Maybe<H> cu_seqlens, Maybe<H> h0, Maybe<H> fresh, Maybe<H> y, In<H> dy, In<H> d_final,
      bool reverse) {
    Out<H> dx = like(host, x), d_gate_a = like(host, gate_a), d_gate_x = like(host, gate_x);
    Out<H> d_log_lambda = like(host, log_lambda), d_h0 = like_or_nothing(host, h0, d_final);
    RgLruForward again = rg_lru_inputs(
        host.view(x), host.view(gate_a), host.view(gate_x), host.view(log_lambda),
        host.view(key_mask), host.view(cu_seqlens), host.view(h0), host.view(fresh), reverse);
    RgLruBackward p;
    p.y = host.view(y);
    std::optional<Out<H>> computed;
    if (!given(p.y)) {
      computed = host.scratch(x, wide_type(again.x), sizes(again.x));
      again.y = p.y = host.view(*computed);
      host.call(rg_lru_forward, cuda::rg_lru_forward, again);
    }
    p.x = again.x;
    p.gate_a = again.gate_a;
    p.gate_x = again.gate_x;
    p.log_lambda = again.log_lambda;
    p.key_mask = again.key_mask;
    p.cu_seqlens = again.cu_seqlens;
    p.initial = again.initial;
    p.fresh = again.fresh;
    p.reverse = reverse;
    p.dy = host.view(dy);
    p.d_final = host.view(d_final);
    p.dx = host.view(dx);
    p.d_gate_a = host.view(d_gate_a);
    p.d_gate_x = host.view(d_gate_x);
    p.d_log_lambda = host.view(d_log_lambda);
    p.d_initial = if_given(host, h0, d_h0);
    host.call(rg_lru_backward, cuda::rg_lru_backward, p);
    return {dx, d_gate_a, d_gate_x, d_log_lambda, d_h0};
  }
};

struct GatedRecurrenceStep {
  static constexpr const char* schema =
      "rg_lru_step(Tensor x, Tensor gate_a, Tensor gate_x, Tensor log_lambda, Tensor(a!) state, "
      "Tensor? fresh) -> Tensor y";

  template <class H>
  static Out<H> run(H& host, In<H> x, In<H> gate_a, In<H> gate_x, In<H> log_lambda, In<H> state,
                    Maybe<H> fresh) {
    const char* const op = "rg_lru_step";
    RgLruForward p =
        rg_lru_inputs(host.view(x), host.view(gate_a), host.view(gate_x), host.view(log_lambda), {},
                      {}, host.view(state), host.view(fresh), false);
    check_rank(op, 2, {{"x", p.x}});
    const Sizes rows = sizes(p.x);
    check_shape(op, "gate_a", p.gate_a, rows);
    check_shape(op, "gate_x", p.gate_x, rows);
    check_shape(op, "state", p.initial, rows);
    check_shape(op, "log_lambda", p.log_lambda, {rows[1]});
    if (given(p.fresh)) check_shape(op, "fresh", p.fresh, {rows[0]});
    Out<H> y = like(host, x);
    for (Tensor* t : {&p.x, &p.gate_a, &p.gate_x}) *t = as_tokens(*t);
    p.y = as_tokens(host.view(y));
    p.final = p.initial;
    as_step("rg_lru", [&] { host.call(rg_lru_forward, cuda::rg_lru_forward, p); });
    return y;
  }
};

struct ShortConvolution {
  static constexpr const char* schema =
      "short_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? cu_seqlens, Tensor? state, "
      "bool causal) -> (Tensor y, Tensor final)";

  template <class H>
  static std::tuple<Out<H>, Out<H>> run(H& host, In<H> x, In<H> weight, Maybe<H> bias,
                                        Maybe<H> cu_seqlens, Maybe<H> state, bool causal) {
    const char* const op = "short_conv";
    ShortConvForward p;
    p.x = host.view(x);
    p.weight = host.view(weight);
    p.bias = host.view(bias);
    p.cu_seqlens = host.view(cu_seqlens);
    p.initial = host.view(state);
    check_rank(op, 3, {{"x", p.x}});
    check_rank(op, 2, {{"weight", p.weight}});
    const int64_t sequences = count_sequences(op, p.x, p.cu_seqlens);
    const int64_t tail = causal && p.weight.shape[1] > 0 ? p.weight.shape[1] - 1 : 0;
    Out<H> y = like(host, x);
    Out<H> last = host.extra(x, p.x.dtype, {sequences, tail, p.x.shape[2]});
    p.y = host.view(y);
    if (causal) p.final = host.view(last);
    p.causal = causal;
    host.call(short_conv_forward, cuda::short_conv_forward, p);
    return {y, last};
  }
};

struct ShortConvolutionGradient {
  static constexpr const char* schema =
      "short_conv_backward(Tensor x, Tensor weight, Tensor? bias, Tensor? cu_seqlens, "
      "Tensor? state, Tensor dy, Tensor d_final, bool causal)"
      " -> (Tensor dx, Tensor d_weight, Tensor d_bias, Tensor d_state)";

  template <class H>
  static std::tuple<Out<H>, Out<H>, Out<H>, Out<H>> run(H& host, In<H> x, In<H> weight,
                                                        Maybe<H> bias, Maybe<H> cu_seqlens,
                                                        Maybe<H> state, In<H> dy, In<H> d_final,
                                                        bool causal) {
    Out<H> dx = like(host, x), d_weight = like(host, weight);
    Out<H> d_bias = like_or_nothing(host, bias, x), d_state = like_or_nothing(host, state, x);
    ShortConvBackward p;
    p.x = host.view(x);
    p.weight = host.view(weight);
    p.cu_seqlens = host.view(cu_seqlens);
    p.initial = host.view(state);
    p.dy = host.view(dy);
    if (causal) p.d_final = host.view(d_final);
    p.dx = host.view(dx);
    p.d_weight = host.view(d_weight);
    p.d_bias = if_given(host, bias, d_bias);
    p.d_initial = if_given(host, state, d_state);
    p.causal = causal;
    host.call(short_conv_backward, cuda::short_conv_backward, p);
    return {dx, d_weight, d_bias, d_state};
  }
};

struct ShortConvolutionStep {
  static constexpr const char* schema =
      "short_conv_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state) -> Tensor y";

  template <class H>
  static Out<H> run(H& host, In<H> x, In<H> weight, Maybe<H> bias, In<H> state) {
    const char* const op = "short_conv_step";
    ShortConvForward p;
    p.x = host.view(x);
    p.weight = host.view(weight);
    p.bias = host.view(bias);
    p.initial = p.final = host.view(state);
    check_rank(op, 2, {{"x", p.x}, {"weight", p.weight}});
    const int64_t n = p.x.shape[0], channels = p.x.shape[1], width = p.weight.shape[1];
    check_shape(op, "weight", p.weight, {channels, width});
    check_shape(op, "state", p.initial, {n, width > 0 ? width - 1 : 0, channels});
    if (given(p.bias)) check_shape(op, "bias", p.bias, {channels});
    Out<H> y = like(host, x);
    // The rows of the state move before x joins them.
    std::optional<Out<H>> moved;
    if (overlap(p.x, p.initial)) p.x = host.view(*(moved = host.clone(x)));
    p.x = as_tokens(p.x);
    p.y = as_tokens(host.view(y));
    as_step("short_conv", [&] { host.call(short_conv_forward, cuda::short_conv_forward, p); });
    return y;
  }
};

}  // namespace latte::operators
