// SPDX-License-Identifier: Apache-2.0
// Bidirectional latent attention of one head: p(s|l) is a softmax over the whole sequence, so the
// state of all tokens comes first and every query reads its mean.
//
// Backward, with w_sl = p(s|l), u_t = dy_t . mean and H_l = sum_t p_tl dy_t (plus the gradient of
// the returned mean):
//   dq_t = p_t (u_t - <p_t, u_t>)      dv_s = sum_l w_sl H_l
//   dk_sl = w_sl (v_s . H_l - H_l . mean_l + norm_l d_norm_l)
#pragma once

#include "cpu/head.h"

namespace latte::LATTE_ISA {

template <class T>
struct BidirectionalScratch {
  T *q, *k, *p, *dq, *dk;  // rows of L
  T *alpha, *u;            // blocked over L
  T* limit;                // a row of L
  T* v;                    // rows of D, of dy as well
  T* y;                    // blocked over D
  T *r, *z, *top, *h0 = nullptr;
  T *mean, *mean_transposed = nullptr, *h = nullptr, *h_transposed = nullptr;

  BidirectionalScratch(Arena& arena, const HeadTask& task, bool backward) {
    const int64_t width = round_up<T>(task.latents), row = kChunk * padded_stride<T>(width);
    const int64_t square = Tiles<T>::size(task.latents, task.dim);
    for (T** p_row : {&q, &k, &p}) *p_row = arena.take<T>(row);
    alpha = arena.take<T>(blocked_size<T>(width));
    limit = arena.take<T>(width);
    v = arena.take<T>(kChunk * padded_stride<T>(round_up<T>(task.dim)));
    y = arena.take<T>(blocked_size<T>(task.dim));
    for (T** per_latent : {&r, &z, &top}) *per_latent = arena.take<T>(width);
    mean = arena.take<T>(square);
    if (!backward) return;
    for (T** p_row : {&dq, &dk}) *p_row = arena.take<T>(row);
    u = arena.take<T>(blocked_size<T>(width));
    h0 = arena.take<T>(width);
    h = arena.take<T>(square);
    const int64_t transposed = Tiles<T>::size(task.dim, task.latents);
    mean_transposed = arena.take<T>(transposed);
    h_transposed = arena.take<T>(transposed);
  }
};

template <class T>
class Bidirectional {
 public:
  Bidirectional(const HeadTask& task, Arena arena, bool backward)
      : task_(task), s_(arena, task, backward) {}

  void summarise() {
    sum_keys();
    finish_state(task_.final, task_.latents, task_.dim, norm_, mean_, true);
  }
  void output() {
    load_state();
    if (task_.final.norm) copy_state<T>(task_.initial, task_.final, task_.latents, task_.dim);
    read_mean();
  }
  void forward() {
    summarise();
    read_mean();
  }

  void gather() {
    load_state();
    start_gradient();
    gather_queries();
    const HeadState& carry = task_.carry_out;
    for (int64_t l = 0; l < task_.latents; ++l)
      for (int64_t d = 0; d < task_.dim; ++d)
        static_cast<T*>(carry.mean)[l * carry.mean_stride_l + d * carry.mean_stride_d] =
            h_.at(l, d);
  }
  void spread() {
    load_state();
    start_gradient();
    const HeadState& carry = task_.carry_in;
    for (int64_t l = 0; l < task_.latents; ++l)
      for (int64_t d = 0; d < task_.dim; ++d)
        h_.at(l, d) = read<T>(carry.mean, l * carry.mean_stride_l + d * carry.mean_stride_d);
    finish_h();
    spread_to_keys();
  }
  void backward() {
    sum_keys();
    start_gradient();
    gather_queries();
    finish_h();
    spread_to_keys();
  }

 private:
  static int64_t tokens_in_chunk(int64_t first, int64_t end) {
    return end - first < kChunk ? end - first : kChunk;
  }

  // The state of all keys, which other stages have summed: reference and normaliser are its own.
  void load_state() {
    const HeadState& state = task_.initial;
    mean_.clear();
    for (int64_t l = 0; l < width_; ++l) {
      s_.r[l] = kLowest<T>;
      s_.z[l] = 0;
      s_.top[l] = kAbsentLogit<T>;
    }
    for (int64_t l = 0; l < task_.latents; ++l) {
      s_.z[l] = read<T>(state.norm, l * state.norm_stride);
      s_.top[l] = read<T>(state.max, l * state.max_stride);
      s_.r[l] = s_.top[l] > kLowest<T> ? s_.top[l] : kLowest<T>;
      for (int64_t d = 0; d < task_.dim; ++d)
        mean_.at(l, d) = read<T>(state.mean, l * state.mean_stride_l + d * state.mean_stride_d);
    }
  }

  void start_gradient() {
    mean_transposed_.clear();
    h_transposed_.clear();
    h_.clear();
    for (int64_t l = 0; l < task_.latents; ++l)
      for (int64_t d = 0; d < task_.dim; ++d) mean_transposed_.at(d, l) = mean_.at(l, d);
  }

  // The gradient of the returned state joins H; h0 = norm d_norm - H . mean.
  void finish_h() {
    const HeadState& d_final = task_.d_final;
    for (int64_t l = 0; l < width_; ++l) s_.h0[l] = 0;
    for (int64_t l = 0; l < task_.latents; ++l) {
      T dot = 0;
      for (int64_t d = 0; d < task_.dim; ++d) {
        T& h = h_.at(l, d);
        if (d_final.mean)
          h += read<T>(d_final.mean, l * d_final.mean_stride_l + d * d_final.mean_stride_d);
        h_transposed_.at(d, l) = h;
        dot += h * mean_.at(l, d);
      }
      const T norm = s_.z[l] == 0 ? T(0) : s_.z[l] * exp_scalar(s_.r[l] - s_.top[l]);
      const T d_norm = d_final.norm ? read<T>(d_final.norm, l * d_final.norm_stride) : T(0);
      s_.h0[l] = norm * d_norm - dot;
    }
  }

  // y of the stage's queries.
  void read_mean() {
    const Sink<T> y(task_.y, PerRow::every, task_.dim, task_.group);
    const int64_t end = task_.end * task_.group;
    for (int64_t first = task_.begin * task_.group; first < end; first += kChunk) {
      const int64_t n = tokens_in_chunk(first, end);
      latent_probabilities(first, n);
      ScanOperands<T> scan = scan_operands(n, mean_, s_.y);
      scan.g = row_blocks_of<const T>(s_.p, stride_);
      write_in_place(scan, y, first);
      PrefetchList next(tile_count(mean_));
      if (first + n < end) next.add(first + n, q_, y);
      scan.prefetch = &next;
      scan_tiles<T, Part::output_only, Decay::none>(scan);
      flush_blocks(y, first, n, s_.y);
    }
  }

  // The state of the stage's keys, with its mean in the tiles.
  void sum_keys() {
    start_state(HeadState(), task_.latents, task_.dim, width_, norm_, mean_, false);
    for (int64_t first = task_.begin; first < task_.end; first += kChunk) {
      const int64_t n = tokens_in_chunk(first, task_.end);
      const RowsInUse<T> ks(k_, first, n, s_.k, stride_);
      Prepared<T> prepared;
      prepared.e = s_.p;
      prepared.row_stride = stride_;
      prepared.alpha = s_.alpha;
      prepared.limit = s_.limit;
      Runs runs;
      prepared.runs = &runs;
      const Keys keys =
          prepare<T, Operands::keys_only>(n, width_, ks.data, ks.stride, norm_, prepared);
      if (keys == Keys::raised) mean_.scale_rows(s_.alpha);
      ScanOperands<T> scan = scan_operands<T>(n, mean_, nullptr);
      scan.x = row_blocks_of<const T>(s_.p, stride_);
      scan.y = column_operand(v_, first, n, task_.end - first - n, s_.v, value_stride_);
      scan.alpha = s_.alpha;
      scan.runs = &runs;
      PrefetchList next(tile_count(mean_));
      if (first + n < task_.end) next.add(first + n, k_, v_);
      scan.prefetch = &next;
      if (keys == Keys::rising) {
        scan_tiles<T, Part::update_only, Decay::rows_before>(scan);
      } else {
        scan_tiles<T, Part::update_only, Decay::none>(scan);
      }
    }
    for (int64_t l = 0; l < task_.latents; ++l) {
      const T scale = s_.z[l] == 0 ? T(0) : 1 / s_.z[l];
      for (int64_t d = 0; d < task_.dim; ++d) mean_.at(l, d) *= scale;
    }
  }

  // p(l|t) of a chunk into rows p.
  void latent_probabilities(int64_t first, int64_t n) {
    alignas(64) T inverse_sums[kChunk];
    softmax_of(q_, first, n, width_, s_.q, s_.p, stride_, inverse_sums);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t l = 0; l < width_; l += kLanes<T>)
        store(s_.p + t * stride_ + l, load(s_.p + t * stride_ + l) * inverse_sums[t]);
  }

  // H += p (x) dy and dq over all queries.
  void gather_queries() {
    const Source<T> dy = output_gradient<T>(task_);
    const Sink<T> dq(task_.dq, PerRow::every, task_.latents, task_.group);
    const int64_t end = task_.end * task_.group;
    const T scale = T(task_.scale);
    for (int64_t first = task_.begin * task_.group; first < end; first += kChunk) {
      const int64_t n = tokens_in_chunk(first, end);
      latent_probabilities(first, n);
      const RowsInUse<T> dys(dy, first, n, s_.v, value_stride_, cpu::kMaxRowStride);
      ScanOperands<T> update = scan_operands<T>(n, h_, nullptr);
      update.x = row_blocks_of<const T>(s_.p, stride_);
      update.y = column_blocks_of(dys.data, dys.stride);
      ScanOperands<T> output = scan_operands(n, mean_transposed_, s_.u);
      output.g = row_blocks_of(dys.data, dys.stride);
      PrefetchList next(tile_count(h_) + tile_count(mean_transposed_));
      if (first + n < end) {
        next.add(first + n, q_, dy);
        next.add(first, dq);
      }
      update.prefetch = output.prefetch = &next;
      scan_tiles<T, Part::update_only, Decay::none>(update);
      scan_tiles<T, Part::output_only, Decay::none>(output);
      const RowsResult<T> result(dq, first, s_.dq, stride_);
      alignas(64) T means[kChunk];
      row_products(n, width_, s_.p, stride_, s_.u, means);
      for (int64_t t = 0; t < n; ++t) {
        const T mean = means[t] - log_sum_gradient<T>(task_, first + t);
        for (int64_t l = 0; l < width_; l += kLanes<T>) {
          const Vec<T> u = load(blocked(s_.u, t, l));
          store(result.data + t * result.stride + l,
                load(s_.p + t * stride_ + l) * (u - mean) * scale);
        }
      }
      result.flush(n);
    }
  }

  // dv = w H and dk = w (v H^T + h0) over all keys.
  void spread_to_keys() {
    const Sink<T> dk(task_.dk, PerRow::first, task_.latents, 1);
    const Sink<T> dv(task_.dv, PerRow::first, task_.dim, 1);
    const T scale = T(task_.scale);
    for (int64_t first = task_.begin; first < task_.end; first += kChunk) {
      const int64_t n = tokens_in_chunk(first, task_.end);
      const RowsInUse<T> ks(k_, first, n, s_.k, stride_);
      for (int64_t l = 0; l < width_; l += kLanes<T>) {
        const Vec<T> r = load(s_.r + l);
        const Vec<T> inverse = reciprocal(max(load(s_.z + l), splat(kEmptyNorm<T>)));
        for (int64_t t = 0; t < n; ++t) {
          const Vec<T> w = exp(load(ks.data + t * ks.stride + l) - r) * inverse;
          store(s_.p + t * stride_ + l, w);
        }
      }
      ScanOperands<T> values = scan_operands(n, h_, s_.y);
      values.g = row_blocks_of<const T>(s_.p, stride_);
      write_in_place(values, dv, first);
      ScanOperands<T> keys = scan_operands(n, h_transposed_, s_.u);
      keys.g = row_operand(v_, first, n, s_.v, value_stride_);
      PrefetchList next(tile_count(h_) + tile_count(h_transposed_));
      if (first + n < task_.end) {
        next.add(first + n, k_, v_, dv);
        next.add(first, dk);
      }
      values.prefetch = keys.prefetch = &next;
      scan_tiles<T, Part::output_only, Decay::none>(values);
      scan_tiles<T, Part::output_only, Decay::none>(keys);
      const RowsResult<T> result(dk, first, s_.dk, stride_);
      for (int64_t t = 0; t < n; ++t)
        for (int64_t l = 0; l < width_; l += kLanes<T>) {
          const Vec<T> vh = load(blocked(s_.u, t, l)) + load(s_.h0 + l);
          store(result.data + t * result.stride + l, load(s_.p + t * stride_ + l) * vh * scale);
        }
      result.flush(n);
      flush_blocks(dv, first, n, s_.y);
    }
  }

  const HeadTask& task_;
  const BidirectionalScratch<T> s_;
  const Source<T> q_ = logits_q<T>(task_), k_ = logits_k<T>(task_, 1);
  const Source<T> v_ = values<T>(task_, 1);
  const int64_t width_ = round_up<T>(task_.latents), stride_ = padded_stride<T>(width_);
  const int64_t value_stride_ = padded_stride<T>(round_up<T>(task_.dim));
  const Normaliser<T> norm_{s_.r, s_.z, s_.top};
  const Tiles<T> mean_{s_.mean, task_.latents, task_.dim};
  const Tiles<T> mean_transposed_{s_.mean_transposed, task_.dim, task_.latents};
  const Tiles<T> h_{s_.h, task_.latents, task_.dim};
  const Tiles<T> h_transposed_{s_.h_transposed, task_.dim, task_.latents};
};

}  // namespace latte::LATTE_ISA
