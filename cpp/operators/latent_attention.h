// SPDX-License-Identifier: Apache-2.0
// Operators of latent attention.
#pragma once

#include "host.h"

namespace latte::operators {

template <class H>
struct States {
  Out<H> max, norm, mean;
};

// Memory for max (N,Hk,L), norm (N,Hk,L) and mean (N,Hk,L,D), beside v.
template <class H>
States<H> extra_state(H& host, In<H> v, int64_t sequences, int64_t heads, int64_t latents,
                      int64_t channels) {
  const DType wide = wide_type(host.view(v));
  return {host.extra(v, wide, {sequences, heads, latents}),
          host.extra(v, wide, {sequences, heads, latents}),
          host.extra(v, wide, {sequences, heads, latents, channels})};
}

inline LatentAttentionForward latent_attention_inputs(const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& key_mask,
                                                      const Tensor& cu_seqlens,
                                                      const State& initial, bool causal,
                                                      double scale) {
  LatentAttentionForward p;
  p.q = q;
  p.k = k;
  p.v = v;
  p.key_mask = key_mask;
  p.cu_seqlens = cu_seqlens;
  p.initial = initial;
  p.causal = causal;
  p.scale = scale;
  return p;
}

struct LatentAttention {
  static constexpr const char* schema =
      "latent_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, "
      "Tensor? max, Tensor? norm, Tensor? mean, bool causal, float scale)"
      " -> (Tensor y, Tensor max, Tensor norm, Tensor mean)";

  template <class H>
  static std::tuple<Out<H>, Out<H>, Out<H>, Out<H>> run(H& host, In<H> q, In<H> k, In<H> v,
                                                        Maybe<H> key_mask, Maybe<H> cu_seqlens,
                                                        Maybe<H> max, Maybe<H> norm, Maybe<H> mean,
                                                        bool causal, double scale) {
    const char* const op = "latent_attention";
    LatentAttentionForward p =
        latent_attention_inputs(host.view(q), host.view(k), host.view(v), host.view(key_mask),
                                host.view(cu_seqlens), state(host, max, norm, mean), causal, scale);
    check_rank(op, 4, {{"q", p.q}, {"k", p.k}, {"v", p.v}});
    const int64_t sequences = count_sequences(op, p.q, p.cu_seqlens);
    Out<H> y = host.empty(v, p.v.dtype, {p.q.shape[0], p.q.shape[1], p.q.shape[2], p.v.shape[3]});
    States<H> last = extra_state(host, v, sequences, p.k.shape[1], p.q.shape[3], p.v.shape[3]);
    p.y = host.view(y);
    p.final = state(host, last.max, last.norm, last.mean);
    host.call(latent_attention_forward, cuda::latent_attention_forward, p);
    return {y, last.max, last.norm, last.mean};
  }
};

struct LatentAttentionGradient {
  static constexpr const char* schema =
      "latent_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, "
      "Tensor? cu_seqlens, Tensor? max, Tensor? norm, Tensor? mean, Tensor dy, "
      "Tensor d_final_norm, Tensor d_final_mean, bool causal, float scale)"
      " -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_norm, Tensor d_mean)";

  template <class H>
  static std::tuple<Out<H>, Out<H>, Out<H>, Out<H>, Out<H>> run(
      H& host, In<H> q, In<H> k, In<H> v, Maybe<H> key_mask, Maybe<H> cu_seqlens, Maybe<H> max,
      Maybe<H> norm, Maybe<H> mean, In<H> dy, In<H> d_final_norm, In<H> d_final_mean, bool causal,
      double scale) {
    Out<H> dq = like(host, q), dk = like(host, k), dv = like(host, v);
    Out<H> d_norm = like_or_nothing(host, norm, q), d_mean = like_or_nothing(host, mean, q);
    LatentAttentionBackward p;
    p.q = host.view(q);
    p.k = host.view(k);
    p.v = host.view(v);
    p.key_mask = host.view(key_mask);
    p.cu_seqlens = host.view(cu_seqlens);
    p.initial = state(host, max, norm, mean);
    p.dy = host.view(dy);
    p.d_final = {Tensor{}, host.view(d_final_norm), host.view(d_final_mean)};
    p.dq = host.view(dq);
    p.dk = host.view(dk);
    p.dv = host.view(dv);
    p.d_initial = {Tensor{}, if_given(host, norm, d_norm), if_given(host, norm, d_mean)};
    p.causal = causal;
    p.scale = scale;
    host.call(latent_attention_backward, cuda::latent_attention_backward, p);
    return {dq, dk, dv, d_norm, d_mean};
  }
};

struct LatentAttentionOneStep {
  static constexpr const char* schema =
      "latent_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) max, Tensor(b!) norm, "
      "Tensor(c!) mean, float scale) -> Tensor y";

  template <class H>
  static Out<H> run(H& host, In<H> q, In<H> k, In<H> v, In<H> max, In<H> norm, In<H> mean,
                    double scale) {
    LatentAttentionStep p;
    p.q = host.view(q);
    p.k = host.view(k);
    p.v = host.view(v);
    p.state = state(host, max, norm, mean);
    p.scale = scale;
    check_rank("latent_attention_step", 3, {{"q", p.q}, {"k", p.k}, {"v", p.v}});
    Out<H> y = host.empty(v, p.v.dtype, {p.q.shape[0], p.q.shape[1], p.v.shape[2]});
    p.y = host.view(y);
    host.call(latent_attention_step, cuda::latent_attention_step, p);
    return y;
  }
};

struct MergeStates {
  static constexpr const char* schema =
      "state_merge(Tensor max, Tensor norm, Tensor mean, Tensor other_max, Tensor other_norm, "
      "Tensor other_mean) -> (Tensor max, Tensor norm, Tensor mean)";

  template <class H>
  static std::tuple<Out<H>, Out<H>, Out<H>> run(H& host, In<H> max, In<H> norm, In<H> mean,
                                                In<H> other_max, In<H> other_norm,
                                                In<H> other_mean) {
    check_rank("state_merge", 4, {{"mean", host.view(mean)}});
    Out<H> out_max = like(host, max), out_norm = like(host, norm), out_mean = like(host, mean);
    const StateMerge p{state(host, max, norm, mean), state(host, other_max, other_norm, other_mean),
                       state(host, out_max, out_norm, out_mean)};
    host.call(state_merge, cuda::state_merge, p);
    return {out_max, out_norm, out_mean};
  }
};

}  // namespace latte::operators
