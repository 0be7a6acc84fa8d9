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
  T *ew, *alpha, *u;       // paired and blocked over L
  T *v, *y, *vg;           // blocked and paired over D
  T *r, *z, *top, *h0;
  T *mean, *mean_transposed, *h, *h_transposed;

  BidirectionalScratch(Arena& arena, const HeadTask& task, bool backward) {
    const int64_t width = round_up<T>(task.latents), row = kChunk * padded_stride<T>(width);
    const int64_t square = Tiles<T>::size(task.latents, task.dim);
    for (T** p_row : {&q, &k, &p}) *p_row = arena.take<T>(row);
    ew = arena.take<T>(paired_size<T>(width, kChunk));
    alpha = arena.take<T>(blocked_size<T>(width, kChunk));
    for (T** block : {&v, &y}) *block = arena.take<T>(blocked_size<T>(task.dim, kChunk));
    for (T** per_latent : {&r, &z, &top}) *per_latent = arena.take<T>(width);
    mean = arena.take<T>(square);
    if (!backward) return;
    for (T** p_row : {&dq, &dk}) *p_row = arena.take<T>(row);
    u = arena.take<T>(blocked_size<T>(width, kChunk));
    vg = arena.take<T>(paired_size<T>(task.dim, kChunk));
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

  void forward() {
    summarise();
    const Sink<T> y(task_.y, PerRow::every, task_.dim, task_.group);
    const int64_t rows = task_.tokens * task_.group;
    for (int64_t first = 0; first < rows; first += kChunk) {
      const int64_t n = tokens_in_chunk(first, rows);
      latent_probabilities(first, n);
      ScanOperands<T> scan = scan_operands<T>(n, s_.ew, nullptr, s_.y, mean_);
      if (y.in_place()) {
        scan.direct = y.row_in_place(first);
        scan.direct_stride = y.stride_in_place();
      }
      scan_tiles<T, Part::output_only, Decay::none>(scan);
      flush_blocks(y, first, n, s_.y);
    }
    finish_state(task_.final, task_.latents, task_.dim, norm_, mean_, true);
  }

  void backward() {
    summarise();
    const Tiles<T> mean_transposed{s_.mean_transposed, task_.dim, task_.latents};
    const Tiles<T> h{s_.h, task_.latents, task_.dim};
    const Tiles<T> h_transposed{s_.h_transposed, task_.dim, task_.latents};
    mean_transposed.clear();
    h_transposed.clear();
    h.clear();
    for (int64_t l = 0; l < task_.latents; ++l)
      for (int64_t d = 0; d < task_.dim; ++d) {
        mean_transposed.at(d, l) = mean_.at(l, d);
        if (task_.d_final.mean)
          h.at(l, d) = read<T>(task_.d_final.mean,
                               l * task_.d_final.mean_stride_l + d * task_.d_final.mean_stride_d);
      }
    gather_queries(mean_transposed, h);
    for (int64_t l = 0; l < width_; ++l) s_.h0[l] = 0;
    for (int64_t l = 0; l < task_.latents; ++l) {
      T dot = 0;
      for (int64_t d = 0; d < task_.dim; ++d) {
        h_transposed.at(d, l) = h.at(l, d);
        dot += h.at(l, d) * mean_.at(l, d);
      }
      const T norm = s_.z[l] == 0 ? T(0) : s_.z[l] * exp_scalar(s_.r[l] - s_.top[l]);
      const T d_norm =
          task_.d_final.norm ? read<T>(task_.d_final.norm, l * task_.d_final.norm_stride) : T(0);
      s_.h0[l] = norm * d_norm - dot;
    }
    spread_to_keys(h, h_transposed);
  }

 private:
  static int64_t tokens_in_chunk(int64_t first, int64_t rows) {
    return rows - first < kChunk ? rows - first : kChunk;
  }

  // The state of all tokens, with its mean in the tiles.
  void summarise() {
    start_state(HeadState(), task_.latents, task_.dim, width_, norm_, mean_, false);
    for (int64_t first = 0; first < task_.tokens; first += kChunk) {
      const int64_t n = tokens_in_chunk(first, task_.tokens);
      const RowsInUse<T> ks(k_, first, n, s_.k, stride_);
      Prepared<T> prepared;
      prepared.ew = s_.ew;
      prepared.alpha = s_.alpha;
      const Keys keys = prepare<T, Operands::keys_only>(n, width_, nullptr, 0, ks.data, ks.stride,
                                                        norm_, prepared);
      pack_blocks(v_, first, n, s_.v);
      ScanOperands<T> scan = scan_operands<T>(n, s_.ew, s_.v, nullptr, mean_);
      scan.alpha = s_.alpha;
      PrefetchList next;
      if (first + n < task_.tokens) {
        next.add(k_, first + n);
        next.add(v_, first + n);
        next.pace(tile_count(mean_));
        scan.prefetch = &next;
      }
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

  // p(l|t) of a chunk into rows p and both halves of the pair.
  void latent_probabilities(int64_t first, int64_t n) {
    const RowsInUse<T> qs(q_, first, n, s_.q, stride_);
    alignas(64) T inverse_sums[kChunk];
    softmax_rows(n, width_, qs.data, qs.stride, s_.p, stride_, inverse_sums);
    for (int64_t t = 0; t < n; ++t)
      for (int64_t l = 0; l < width_; l += kLanes<T>) {
        const Vec<T> p = load(s_.p + t * stride_ + l) * inverse_sums[t];
        store(s_.p + t * stride_ + l, p);
        store_pair(s_.ew, kChunk, t, l, p, p);
      }
  }

  // H += p (x) dy and dq over all queries.
  void gather_queries(const Tiles<T>& mean_transposed, const Tiles<T>& h) {
    const Source<T> dy = output_gradient<T>(task_);
    const Sink<T> dq(task_.dq, PerRow::every, task_.latents, task_.group);
    const int64_t rows = task_.tokens * task_.group;
    const T scale = T(task_.scale);
    for (int64_t first = 0; first < rows; first += kChunk) {
      const int64_t n = tokens_in_chunk(first, rows);
      latent_probabilities(first, n);
      pair_twice(dy, first, n, s_.v);
      scan_tiles<T, Part::update_only, Decay::none>(scan_operands<T>(n, s_.ew, s_.v, nullptr, h));
      scan_tiles<T, Part::output_only, Decay::none>(
          scan_operands<T>(n, s_.vg, nullptr, s_.u, mean_transposed));
      const RowsResult<T> result(dq, first, s_.dq, stride_);
      for (int64_t t = 0; t < n; ++t) {
        const T* p = s_.p + t * stride_;
        Vec<T> sum = {};
        for (int64_t l = 0; l < width_; l += kLanes<T>)
          sum += load(p + l) * load(blocked(s_.u, kChunk, t, l));
        const Vec<T> mean = splat(reduce_add<T>(sum));
        for (int64_t l = 0; l < width_; l += kLanes<T>) {
          const Vec<T> u = load(blocked(s_.u, kChunk, t, l));
          store(result.data + t * result.stride + l, load(p + l) * (u - mean) * scale);
        }
      }
      result.flush(n);
    }
  }

  // dv = w H and dk = w (v H^T + h0) over all keys.
  void spread_to_keys(const Tiles<T>& h, const Tiles<T>& h_transposed) {
    const Sink<T> dk(task_.dk, PerRow::first, task_.latents, 1);
    const Sink<T> dv(task_.dv, PerRow::first, task_.dim, 1);
    const T scale = T(task_.scale);
    for (int64_t first = 0; first < task_.tokens; first += kChunk) {
      const int64_t n = tokens_in_chunk(first, task_.tokens);
      const RowsInUse<T> ks(k_, first, n, s_.k, stride_);
      for (int64_t l = 0; l < width_; l += kLanes<T>) {
        const Vec<T> r = load(s_.r + l);
        const Vec<T> inverse = reciprocal(max(load(s_.z + l), splat(kEmptyNorm<T>)));
        for (int64_t t = 0; t < n; ++t) {
          const Vec<T> w = exp(load(ks.data + t * ks.stride + l) - r) * inverse;
          store(s_.p + t * stride_ + l, w);
          store_pair(s_.ew, kChunk, t, l, w, w);
        }
      }
      pair_twice(v_, first, n, nullptr);
      ScanOperands<T> values = scan_operands<T>(n, s_.ew, nullptr, s_.y, h);
      if (dv.in_place()) {
        values.direct = dv.row_in_place(first);
        values.direct_stride = dv.stride_in_place();
      }
      scan_tiles<T, Part::output_only, Decay::none>(values);
      scan_tiles<T, Part::output_only, Decay::none>(
          scan_operands<T>(n, s_.vg, nullptr, s_.u, h_transposed));
      const RowsResult<T> result(dk, first, s_.dk, stride_);
      for (int64_t t = 0; t < n; ++t)
        for (int64_t l = 0; l < width_; l += kLanes<T>) {
          const Vec<T> vh = load(blocked(s_.u, kChunk, t, l)) + load(s_.h0 + l);
          store(result.data + t * result.stride + l, load(s_.p + t * stride_ + l) * vh * scale);
        }
      result.flush(n);
      flush_blocks(dv, first, n, s_.y);
    }
  }

  // Rows of D as both halves of a pair, and blocked unless `blocks` is null.
  void pair_twice(const Source<T>& source, int64_t first, int64_t n, T* blocks) {
    source.for_each_vector(first, n, [&](int64_t i, int64_t c, Vec<T> x) {
      store_pair(s_.vg, kChunk, i, c, x, x);
      if (blocks) store(blocked(blocks, kChunk, i, c), x);
    });
  }

  const HeadTask& task_;
  const BidirectionalScratch<T> s_;
  const Source<T> q_ = logits_q<T>(task_), k_ = logits_k<T>(task_, 1);
  const Source<T> v_ = values<T>(task_, 1);
  const int64_t width_ = round_up<T>(task_.latents), stride_ = padded_stride<T>(width_);
  const Normaliser<T> norm_{s_.r, s_.z, s_.top};
  const Tiles<T> mean_{s_.mean, task_.latents, task_.dim};
};

}  // namespace latte::LATTE_ISA
