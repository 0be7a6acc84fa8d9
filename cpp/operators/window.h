// SPDX-License-Identifier: Apache-2.0
// Operators of windows and of Macchiato.
//
// `past` counts cached keys in front of every sequence's tokens. `save` asks for what the backward
// operator needs; without it `wide`, the window's output in the compute type, is empty.
#pragma once

#include "latent_attention.h"

namespace latte::operators {

// Keys and values beyond the window, with queries of their own.
struct Sinks {
  Tensor q, k, v, position, start;
};

struct WindowScalars {
  int64_t window, past;
  bool causal;
  double scale, softcap;
};

template <class Params>
Params window_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& key_mask,
                     const Tensor& cu_seqlens, const Sinks& sinks, const WindowScalars& scalars) {
  Params p;
  p.q = q;
  p.k = k;
  p.v = v;
  p.key_mask = key_mask;
  p.cu_seqlens = cu_seqlens;
  p.q_sink = sinks.q;
  p.k_sink = sinks.k;
  p.v_sink = sinks.v;
  p.sink_position = sinks.position;
  p.start = sinks.start;
  p.window = scalars.window;
  p.past = scalars.past;
  p.causal = scalars.causal;
  p.scale = scalars.scale;
  p.softcap = scalars.softcap;
  return p;
}

template <class H>
SlidingWindowStep window_step(H& host, In<H> q, In<H> k, In<H> v, In<H> key, In<H> value,
                              In<H> valid, In<H> position, Maybe<H> q_sink, Maybe<H> k_sink,
                              Maybe<H> v_sink, Maybe<H> sink_position, double scale,
                              double softcap) {
  SlidingWindowStep p;
  p.q = host.view(q);
  p.k = host.view(k);
  p.v = host.view(v);
  p.ring = {host.view(key), host.view(value), host.view(valid), host.view(position)};
  p.q_sink = host.view(q_sink);
  p.k_sink = host.view(k_sink);
  p.v_sink = host.view(v_sink);
  p.sink_position = host.view(sink_position);
  p.scale = scale;
  p.softcap = softcap;
  return p;
}

// The gradients of a window's inputs.
template <class H>
struct WindowGradients {
  Out<H> q, k, v, q_sink, k_sink, v_sink;
};

template <class H>
WindowGradients<H> window_gradients(H& host, In<H> q, In<H> k, In<H> v, Maybe<H> q_sink,
                                    Maybe<H> k_sink, Maybe<H> v_sink) {
  Out<H> dq = like(host, q), dk = like(host, k), dv = like(host, v);
  Out<H> dq_sink = like_or_nothing(host, q_sink, q), dk_sink = like_or_nothing(host, k_sink, q);
  return {dq, dk, dv, dq_sink, dk_sink, like_or_nothing(host, v_sink, q)};
}

struct SlidingWindowAttention {
  static constexpr const char* schema =
      "sliding_window_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, "
      "Tensor? cu_seqlens, Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, Tensor? sink_position, "
      "Tensor? start, int window, int past, bool causal, float scale, float softcap, bool save)"
      " -> (Tensor y, Tensor log_sum, Tensor wide)";

  template <class H>
  static std::tuple<Out<H>, Out<H>, Out<H>> run(H& host, In<H> q, In<H> k, In<H> v,
                                                Maybe<H> key_mask, Maybe<H> cu_seqlens,
                                                Maybe<H> q_sink, Maybe<H> k_sink, Maybe<H> v_sink,
                                                Maybe<H> sink_position, Maybe<H> start,
                                                int64_t window, int64_t past, bool causal,
                                                double scale, double softcap, bool save) {
    auto p = window_inputs<SlidingWindowForward>(
        host.view(q), host.view(k), host.view(v), host.view(key_mask), host.view(cu_seqlens),
        {host.view(q_sink), host.view(k_sink), host.view(v_sink), host.view(sink_position),
         host.view(start)},
        {window, past, causal, scale, softcap});
    check_rank("sliding_window_attention", 4, {{"q", p.q}, {"k", p.k}, {"v", p.v}});
    const Sizes rows{p.q.shape[0], p.q.shape[1], p.q.shape[2]};
    const Sizes outputs{rows[0], rows[1], rows[2], p.v.shape[3]};
    const DType type = wide_type(p.v);
    const bool needed = save && type != p.v.dtype;
    Out<H> y = host.empty(v, p.v.dtype, outputs);
    Out<H> log_sum = host.extra(v, type, rows);
    Out<H> wide = host.extra(v, type, needed ? outputs : Sizes{0});
    p.y = host.view(y);
    p.log_sum = host.view(log_sum);
    if (needed) p.wide = host.view(wide);
    host.call(sliding_window_forward, cuda::sliding_window_forward, p);
    return {y, log_sum, wide};
  }
};

struct SlidingWindowAttentionGradient {
  static constexpr const char* schema =
      "sliding_window_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, "
      "Tensor? cu_seqlens, Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, Tensor? sink_position, "
      "Tensor? start, Tensor log_sum, Tensor wide, Tensor dy, Tensor? d_log_sum, int window, "
      "int past, bool causal, float scale, float softcap) -> (Tensor dq, Tensor dk, Tensor dv, "
      "Tensor dq_sink, Tensor dk_sink, Tensor dv_sink)";

  template <class H>
  static std::tuple<Out<H>, Out<H>, Out<H>, Out<H>, Out<H>, Out<H>> run(
      H& host, In<H> q, In<H> k, In<H> v, Maybe<H> key_mask, Maybe<H> cu_seqlens, Maybe<H> q_sink,
      Maybe<H> k_sink, Maybe<H> v_sink, Maybe<H> sink_position, Maybe<H> start, In<H> log_sum,
      In<H> wide, In<H> dy, Maybe<H> d_log_sum, int64_t window, int64_t past, bool causal,
      double scale, double softcap) {
    WindowGradients<H> d = window_gradients(host, q, k, v, q_sink, k_sink, v_sink);
    auto p = window_inputs<SlidingWindowBackward>(
        host.view(q), host.view(k), host.view(v), host.view(key_mask), host.view(cu_seqlens),
        {host.view(q_sink), host.view(k_sink), host.view(v_sink), host.view(sink_position),
         host.view(start)},
        {window, past, causal, scale, softcap});
    p.log_sum = host.view(log_sum);
    p.wide = host.view(wide);
    p.dy = host.view(dy);
    p.d_log_sum = host.view(d_log_sum);
    p.dq = host.view(d.q);
    p.dk = host.view(d.k);
    p.dv = host.view(d.v);
    p.dq_sink = if_given(host, q_sink, d.q_sink);
    p.dk_sink = if_given(host, k_sink, d.k_sink);
    p.dv_sink = if_given(host, v_sink, d.v_sink);
    host.call(sliding_window_backward, cuda::sliding_window_backward, p);
    return {d.q, d.k, d.v, d.q_sink, d.k_sink, d.v_sink};
  }
};

struct SlidingWindowAttentionStep {
  static constexpr const char* schema =
      "sliding_window_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) key, "
      "Tensor(b!) value, Tensor(c!) valid, Tensor(d!) position, Tensor? q_sink, Tensor? k_sink, "
      "Tensor? v_sink, Tensor? sink_position, float scale, float softcap) -> Tensor y";

  template <class H>
  static Out<H> run(H& host, In<H> q, In<H> k, In<H> v, In<H> key, In<H> value, In<H> valid,
                    In<H> position, Maybe<H> q_sink, Maybe<H> k_sink, Maybe<H> v_sink,
                    Maybe<H> sink_position, double scale, double softcap) {
    SlidingWindowStep p = window_step(host, q, k, v, key, value, valid, position, q_sink, k_sink,
                                      v_sink, sink_position, scale, softcap);
    check_rank("sliding_window_attention_step", 3, {{"q", p.q}, {"k", p.k}, {"v", p.v}});
    Out<H> y = host.empty(v, p.v.dtype, {p.q.shape[0], p.q.shape[1], p.v.shape[2]});
    p.y = host.view(y);
    host.call(sliding_window_step, cuda::sliding_window_step, p);
    return y;
  }
};

template <class Params>
void check_ranks(const char* op, int64_t rank, const Params& p) {
  check_rank(op, rank,
             {{"q_latent", p.q_latent},
              {"k_latent", p.latent.k},
              {"q", p.window.q},
              {"k", p.window.k},
              {"v", p.window.v}});
}

struct MacchiatoAttention {
  static constexpr const char* schema =
      "macchiato_attention(Tensor q_latent, Tensor k_latent, Tensor? v_latent, Tensor q, Tensor k, "
      "Tensor v, Tensor? latent_mask, Tensor? key_mask, Tensor? cu_seqlens, Tensor? max, "
      "Tensor? norm, Tensor? mean, Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, "
      "Tensor? sink_position, Tensor? start, int window, int past, bool causal, float scale, "
      "float softcap, float latent_scale, bool save) -> (Tensor y, Tensor total, Tensor log_sum, "
      "Tensor wide, Tensor max, Tensor norm, Tensor mean)";

  template <class H>
  static std::tuple<Out<H>, Out<H>, Out<H>, Out<H>, Out<H>, Out<H>, Out<H>> run(
      H& host, In<H> q_latent, In<H> k_latent, Maybe<H> v_latent, In<H> q, In<H> k, In<H> v,
      Maybe<H> latent_mask, Maybe<H> key_mask, Maybe<H> cu_seqlens, Maybe<H> max, Maybe<H> norm,
      Maybe<H> mean, Maybe<H> q_sink, Maybe<H> k_sink, Maybe<H> v_sink, Maybe<H> sink_position,
      Maybe<H> start, int64_t window, int64_t past, bool causal, double scale, double softcap,
      double latent_scale, bool save) {
    const char* const op = "macchiato_attention";
    MacchiatoForward p;
    p.q_latent = host.view(q_latent);
    p.latent.k = host.view(k_latent);
    p.latent.v = host.view(v_latent);
    p.latent.key_mask = host.view(latent_mask);
    p.latent.initial = state(host, max, norm, mean);
    p.latent.scale = latent_scale;
    p.window = window_inputs<SlidingWindowForward>(
        host.view(q), host.view(k), host.view(v), host.view(key_mask), host.view(cu_seqlens),
        {host.view(q_sink), host.view(k_sink), host.view(v_sink), host.view(sink_position),
         host.view(start)},
        {window, past, causal, scale, softcap});
    check_ranks(op, 4, p);
    if (!given(p.latent.v)) p.latent.v = p.window.v;
    const Tensor &query = p.window.q, &values = p.window.v;
    const int64_t sequences = count_sequences(op, query, p.window.cu_seqlens);
    const Sizes rows{query.shape[0], query.shape[1], query.shape[2]};
    const Sizes outputs{rows[0], rows[1], rows[2], values.shape[3]};
    const DType type = wide_type(values);
    const bool rounded = type != values.dtype;
    Out<H> y = host.empty(v, values.dtype, outputs);
    Out<H> total = host.empty(v, type, rounded ? outputs : Sizes{0});
    Out<H> log_sum = host.extra(v, type, rows);
    Out<H> wide = host.extra(v, type, save ? outputs : Sizes{0});
    States<H> last =
        extra_state(host, v, sequences, p.latent.k.shape[1], p.latent.k.shape[3], values.shape[3]);
    p.window.y = host.view(y);
    p.latent.y = rounded ? host.view(total) : p.window.y;
    p.latent.final = state(host, last.max, last.norm, last.mean);
    if (save) {
      p.window.log_sum = host.view(log_sum);
      p.window.wide = host.view(wide);
    } else {
      host.zero(log_sum);
    }
    host.call(macchiato_forward, cuda::macchiato_forward, p);
    return {y, total, log_sum, wide, last.max, last.norm, last.mean};
  }
};

struct MacchiatoAttentionGradient {
  static constexpr const char* schema =
      "macchiato_attention_backward(Tensor q_latent, Tensor k_latent, Tensor? v_latent, Tensor q, "
      "Tensor k, Tensor v, Tensor? latent_mask, Tensor? key_mask, Tensor? cu_seqlens, Tensor? max, "
      "Tensor? norm, Tensor? mean, Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, "
      "Tensor? sink_position, Tensor? start, Tensor total, Tensor log_sum, Tensor wide, Tensor dy, "
      "Tensor? d_final_norm, Tensor? d_final_mean, int window, int past, bool causal, float scale, "
      "float softcap, float latent_scale) -> (Tensor dq_latent, Tensor dk_latent, "
      "Tensor dv_latent, Tensor dq, Tensor dk, Tensor dv, Tensor d_norm, Tensor d_mean, "
      "Tensor dq_sink, Tensor dk_sink, Tensor dv_sink)";

  template <class H>
  static std::tuple<Out<H>, Out<H>, Out<H>, Out<H>, Out<H>, Out<H>, Out<H>, Out<H>, Out<H>, Out<H>,
                    Out<H>>
  run(H& host, In<H> q_latent, In<H> k_latent, Maybe<H> v_latent, In<H> q, In<H> k, In<H> v,
      Maybe<H> latent_mask, Maybe<H> key_mask, Maybe<H> cu_seqlens, Maybe<H> max, Maybe<H> norm,
      Maybe<H> mean, Maybe<H> q_sink, Maybe<H> k_sink, Maybe<H> v_sink, Maybe<H> sink_position,
      Maybe<H> start, In<H> total, In<H> log_sum, In<H> wide, In<H> dy, Maybe<H> d_final_norm,
      Maybe<H> d_final_mean, int64_t window, int64_t past, bool causal, double scale,
      double softcap, double latent_scale) {
    Out<H> dq_latent = like(host, q_latent), dk_latent = like(host, k_latent);
    Out<H> dv_latent = like_or_nothing(host, v_latent, q);
    WindowGradients<H> d = window_gradients(host, q, k, v, q_sink, k_sink, v_sink);
    Out<H> d_norm = like_or_nothing(host, norm, q), d_mean = like_or_nothing(host, mean, q);
    MacchiatoBackward p;
    p.q_latent = host.view(q_latent);
    p.y = host.view(total);
    p.latent.k = host.view(k_latent);
    p.latent.v = host.view(v_latent);
    p.latent.key_mask = host.view(latent_mask);
    p.latent.initial = state(host, max, norm, mean);
    p.latent.d_final = {Tensor{}, host.view(d_final_norm), host.view(d_final_mean)};
    p.latent.dk = host.view(dk_latent);
    p.latent.d_initial = {Tensor{}, if_given(host, norm, d_norm), if_given(host, mean, d_mean)};
    p.latent.scale = latent_scale;
    p.dq_latent = host.view(dq_latent);
    p.window = window_inputs<SlidingWindowBackward>(
        host.view(q), host.view(k), host.view(v), host.view(key_mask), host.view(cu_seqlens),
        {host.view(q_sink), host.view(k_sink), host.view(v_sink), host.view(sink_position),
         host.view(start)},
        {window, past, causal, scale, softcap});
    p.window.log_sum = host.view(log_sum);
    p.window.wide = host.view(wide);
    p.window.dy = host.view(dy);
    p.window.dq = host.view(d.q);
    p.window.dk = host.view(d.k);
    p.window.dv = host.view(d.v);
    p.window.dq_sink = if_given(host, q_sink, d.q_sink);
    p.window.dk_sink = if_given(host, k_sink, d.k_sink);
    p.window.dv_sink = if_given(host, v_sink, d.v_sink);
    p.one_value = !given(p.latent.v);
    std::optional<Out<H>> scratch;
    if (!p.one_value) {
      p.latent.dv = host.view(dv_latent);
      // Without latents the core leaves it as it is.
      if (p.latent.k.rank == 4 && p.latent.k.shape[3] == 0) host.zero(dv_latent);
    } else {
      // Both parts of dv meet there unrounded.
      p.latent.v = p.window.v;
      p.latent.dv = p.window.dv;
      if (p.window.dv.dtype != p.window.wide.dtype) {
        scratch = host.scratch(v, p.window.wide.dtype, sizes(p.window.dv));
        p.latent.dv = host.view(*scratch);
      }
    }
    host.call(macchiato_backward, cuda::macchiato_backward, p);
    return {dq_latent, dk_latent, dv_latent, d.q,      d.k,     d.v,
            d_norm,    d_mean,    d.q_sink,  d.k_sink, d.v_sink};
  }
};

struct MacchiatoAttentionStep {
  static constexpr const char* schema =
      "macchiato_attention_step(Tensor q_latent, Tensor k_latent, Tensor? v_latent, Tensor q, "
      "Tensor k, Tensor v, Tensor(a!)? max, Tensor(b!)? norm, Tensor(c!)? mean, Tensor(d!) key, "
      "Tensor(e!) value, Tensor(f!) valid, Tensor(g!) position, Tensor? q_sink, Tensor? k_sink, "
      "Tensor? v_sink, Tensor? sink_position, float scale, float softcap, float latent_scale)"
      " -> Tensor y";

  template <class H>
  static Out<H> run(H& host, In<H> q_latent, In<H> k_latent, Maybe<H> v_latent, In<H> q, In<H> k,
                    In<H> v, Maybe<H> max, Maybe<H> norm, Maybe<H> mean, In<H> key, In<H> value,
                    In<H> valid, In<H> position, Maybe<H> q_sink, Maybe<H> k_sink, Maybe<H> v_sink,
                    Maybe<H> sink_position, double scale, double softcap, double latent_scale) {
    MacchiatoStep p;
    p.q_latent = host.view(q_latent);
    p.latent.k = host.view(k_latent);
    p.latent.v = host.view(v_latent);
    p.latent.state = state(host, max, norm, mean);
    p.latent.scale = latent_scale;
    p.window = window_step(host, q, k, v, key, value, valid, position, q_sink, k_sink, v_sink,
                           sink_position, scale, softcap);
    check_ranks("macchiato_attention_step", 3, p);
    if (!given(p.latent.v)) p.latent.v = p.window.v;
    Out<H> y = host.empty(v, p.window.v.dtype,
                          {p.window.q.shape[0], p.window.q.shape[1], p.window.v.shape[2]});
    p.window.y = host.view(y);
    host.call(macchiato_step, cuda::macchiato_step, p);
    return y;
  }
};

}  // namespace latte::operators
