// SPDX-License-Identifier: Apache-2.0
// Causal latent attention of one head, forward and backward.
//
// Backward, with S the unnormalised state, u_t = dP_t = (dy_t . S_t) / z_t, w = p / z:
//   dq_t = p_t (u_t - <p_t, u_t>)      + p_t d_log_sum_t where the log of q's sum is used as well
//   R_s = sum_(t>=s) w_t (x) dy_t      c_s = -sum_(t>=s) w_t u_t
//   dv_s = sum_l e_s R_s               dk_s = e_s (v_s . R_s + c_s)
// Every contraction over D is the output half of the same scan on a transposed state, so there is
// no horizontal sum: pass F forward in time on S^T gives u, and pass R backward in time gives dv
// (on R) and v . R (on R^T): 12 L D operations. Pass F notes r and z at every chunk border, 2 L
// numbers, so that pass R prepares each chunk from the same reference; nothing else is kept.
#pragma once

#include "cpu/head.h"

namespace latte::LATTE_ISA {

// Heads that are walked together have a normaliser and states each; what a chunk needs in between
// they share.
template <class T>
struct CausalForwardScratch {
  T *q, *k, *p, *inverse_sums, *ew, *alpha, *limit, *v, *y, *own;
  struct Head {
    T *r, *z, *top, *state;
  } heads[cpu::kHeadsTogether];

  CausalForwardScratch(Arena& arena, const HeadTask& task) {
    const int64_t width = round_up<T>(task.latents), row = kChunk * padded_stride<T>(width);
    q = arena.take<T>(row);
    k = arena.take<T>(row);
    p = arena.take<T>(row);
    inverse_sums = arena.take<T>(kChunk);
    ew = arena.take<T>(paired_size<T>(width));
    alpha = arena.take<T>(blocked_size<T>(width));
    limit = arena.take<T>(width);
    v = arena.take<T>(kChunk * padded_stride<T>(round_up<T>(task.dim)));
    y = arena.take<T>(blocked_size<T>(task.dim));
    own = arena.take<T>(Tiles<T>::size(task.latents, task.dim));
    for (int64_t h = 0; h < task.together; ++h) {
      for (T** per_latent : {&heads[h].r, &heads[h].z, &heads[h].top})
        *per_latent = arena.take<T>(width);
      heads[h].state = arena.take<T>(Tiles<T>::size(task.latents, task.dim));
    }
  }
};

template <class T>
class CausalForward {
  using Head = CausalForward;

 public:
  CausalForward(const HeadTask& task, const CausalForwardScratch<T>& scratch, int64_t head)
      : task_(task),
        s_(scratch),
        norm_{scratch.heads[head].r, scratch.heads[head].z, scratch.heads[head].top},
        state_{scratch.heads[head].state, task.latents, task.dim} {}

  void start() const {
    start_state(task_.initial, task_.latents, task_.dim, width_, norm_, state_, false);
  }

  // Of this head, which is heads[h] of so many that are walked together.
  void chunk(int64_t first, const CausalForward* heads, int64_t h, int64_t count) const {
    const int64_t n = end_ - first < kChunk ? end_ - first : kChunk;
    softmax_of(q_, first, n, width_, s_.q, s_.p, stride_, s_.inverse_sums);
    const RowsInUse<T> ks(k_, first, n, s_.k, stride_);
    Prepared<T> prepared;
    prepared.ew = s_.ew;
    prepared.p = s_.p;
    prepared.inverse_sums = s_.inverse_sums;
    prepared.row_stride = stride_;
    prepared.alpha = s_.alpha;
    prepared.limit = s_.limit;
    Runs runs;
    prepared.runs = &runs;
    const Keys keys = prepare<T, Operands::forward>(n, width_, ks.data, ks.stride, norm_, prepared);
    if (keys == Keys::raised) state_.scale_rows(s_.alpha);
    PrefetchList list(tile_count(state_));
    ScanOperands<T> scan = scan_operands(n, state_, s_.y);
    scan.x = first_of_pair(s_.ew);
    scan.g = second_of_pair(s_.ew);
    scan.y = column_operand(v_, first, n, end_ - first - n, s_.v, v_stride_);
    scan.alpha = s_.alpha;
    scan.runs = &runs;
    write_in_place(scan, y_, first);
    const int64_t next = first + kChunk;
    list.add_next(heads, h, count, first, next, next >= end_, &Head::k_, &Head::q_, &Head::v_,
                  &Head::y_);
    scan.prefetch = &list;
    if (keys == Keys::rising) {
      scan_tiles<T, Part::both, Decay::rows_before>(scan);
    } else if (keys == Keys::tied) {
      scan_tied(scan, Tiles<T>{s_.own, task_.latents, task_.dim});
    } else {
      scan_tiles<T, Part::both, Decay::none>(scan);
    }
    flush_blocks(y_, first, n, s_.y);
  }

  void finish() const {
    if (task_.begin == task_.end && task_.initial.norm && task_.final.norm) {
      copy_state<T>(task_.initial, task_.final, task_.latents, task_.dim);
    } else {
      finish_state(task_.final, task_.latents, task_.dim, norm_, state_, false);
    }
  }

 private:
  const HeadTask& task_;
  const CausalForwardScratch<T>& s_;
  const Source<T> q_ = logits_q<T>(task_), k_ = logits_k<T>(task_, task_.group);
  const Source<T> v_ = values<T>(task_, task_.group);
  const Sink<T> y_{task_.y, PerRow::every, task_.dim, task_.group};
  const int64_t end_ = task_.end * task_.group;
  const int64_t width_ = round_up<T>(task_.latents), stride_ = padded_stride<T>(width_);
  const int64_t v_stride_ = padded_stride<T>(round_up<T>(task_.dim));
  const Normaliser<T> norm_;
  const Tiles<T> state_;
};

template <class T>
inline void causal_forward(const HeadTask& task, Arena arena) {
  static_assert(cpu::kHeadsTogether == 8);
  const CausalForwardScratch<T> scratch(arena, task);
  const int64_t count = task.together;
  const auto head = [&](int64_t h) {
    h = h < count ? h : 0;
    return CausalForward<T>((&task)[h], scratch, h);
  };
  const CausalForward<T> heads[] = {head(0), head(1), head(2), head(3),
                                    head(4), head(5), head(6), head(7)};
  for (int64_t h = 0; h < count; ++h) heads[h].start();
  const int64_t begin = task.begin * task.group, end = task.end * task.group;
  for (int64_t first = begin; first < end; first += kChunk)
    for (int64_t h = 0; h < count; ++h) heads[h].chunk(first, heads, h, count);
  for (int64_t h = 0; h < count; ++h) heads[h].finish();
}

// What the stages of one backward task have in common.
template <class T>
struct CausalShared {
  T *borders, *wu;

  CausalShared(Arena& arena, const HeadTask& task) {
    const int64_t width = round_up<T>(task.latents), rows = task.tokens * task.group;
    borders = arena.take<T>((rows + kChunk - 1) / kChunk * 2 * width);
    // w u waits in dk for pass R where dk can hold it.
    const RowView<T> dk(task.dk, PerRow::first, task.latents, task.group);
    wu = dk.in_place() ? nullptr : arena.take<T>(rows * padded_stride<T>(width));
  }
};

template <class T>
struct CausalBackwardScratch {
  T *q, *k, *p, *w, *inverse_z, *dq, *dk;  // rows of L
  T *inverse_sums, *limit;                 // of the rows p; a row of L
  T *ew, *alpha, *weights, *u;             // e|w paired; blocked over L
  T *v, *dy;                               // rows of D
  T* dv;                                   // blocked over D
  struct Head {
    T *r, *z, *top, *c, *frame;
    T *forward_state, *r_state, *r_transposed;
  } heads[cpu::kHeadsTogether];

  CausalBackwardScratch(Arena& arena, const HeadTask& task) {
    const int64_t width = round_up<T>(task.latents), row = kChunk * padded_stride<T>(width);
    for (T** p_row : {&q, &k, &p, &w, &inverse_z, &dq, &dk}) *p_row = arena.take<T>(row);
    inverse_sums = arena.take<T>(kChunk);
    limit = arena.take<T>(width);
    ew = arena.take<T>(paired_size<T>(width));
    for (T** block : {&alpha, &weights, &u}) *block = arena.take<T>(blocked_size<T>(width));
    const int64_t value = kChunk * padded_stride<T>(round_up<T>(task.dim));
    for (T** value_row : {&v, &dy}) *value_row = arena.take<T>(value);
    dv = arena.take<T>(blocked_size<T>(task.dim));
    const int64_t transposed = Tiles<T>::size(task.dim, task.latents);
    for (int64_t i = 0; i < task.together; ++i) {
      Head& h = heads[i];
      for (T** per_latent : {&h.r, &h.z, &h.top, &h.c, &h.frame})
        *per_latent = arena.take<T>(width);
      h.forward_state = arena.take<T>(transposed);
      h.r_transposed = arena.take<T>(transposed);
      h.r_state = arena.take<T>(Tiles<T>::size(task.latents, task.dim));
    }
  }
};

template <class T>
class CausalBackward {
  using Head = CausalBackward;

 public:
  CausalBackward(const HeadTask& task, const CausalBackwardScratch<T>& scratch, int64_t head = 0)
      : task_(task),
        dq_(task.dq, PerRow::every, task.latents, task.group),
        dk_(task.dk, PerRow::first, task.latents, task.group),
        dv_(task.dv, PerRow::first, task.dim, task.group),
        s_(scratch),
        h_(scratch.heads[head]) {
    Arena common(task.shared);
    const CausalShared<T> shared(common, task);
    borders_ = shared.borders;
    wu_ = shared.wu ? shared.wu : dk_.row_in_place(0);
    wu_stride_ = shared.wu ? stride_ : dk_.stride_in_place();
  }

  // Pass F: dq, the chunk borders, w u, and the state after the last token.
  void forward() { forward(this, 1); }
  // Of heads that are walked together.
  static void forward(CausalBackward* heads, int64_t count) {
    for (int64_t h = 0; h < count; ++h) heads[h].start_forward();
    for (int64_t first = heads->begin_; first < heads->end_; first += kChunk)
      for (int64_t h = 0; h < count; ++h) heads[h].forward_chunk(first, heads, h, count);
    for (int64_t h = 0; h < count; ++h) heads[h].finish_forward();
  }

  // R and c at the first token, of the stage's own queries.
  void summarise() {
    clear_carry();
    for (int64_t first = last_chunk(); first >= begin_; first -= kChunk) {
      const int64_t n = tokens_in_chunk(first);
      const Keys keys = prepare_reverse(first, n);
      ScanOperands<T> rows = scan_operands<T>(n, r_state_, nullptr);
      rows.reverse = true;
      rows.x = second_of_pair(s_.ew);
      rows.y = column_operand(dy_, first, n, end_ - first - n, s_.dy, value_stride_);
      rows.alpha = s_.alpha;
      rows.runs = &runs_;
      PrefetchList next(tile_count(r_state_));
      if (first > begin_) next.add(first - kChunk, k_, q_, dy_);
      rows.prefetch = &next;
      if (keys == Keys::rising) {
        scan_tiles<T, Part::update_only, Decay::rows_after>(rows);
        carry_queries<true>(first, n);
      } else {
        scan_tiles<T, Part::update_only, Decay::none>(rows);
        carry_queries<false>(first, n);
      }
      note_frame(keys, first);
    }
    store_carry();
  }

  // Pass R: dk and dv, and at token 0 the gradient of the initial state.
  void reverse() { reverse(this, 1); }
  static void reverse(CausalBackward* heads, int64_t count) {
    for (int64_t h = 0; h < count; ++h) heads[h].start_reverse();
    for (int64_t first = heads->last_chunk(); first >= heads->begin_; first -= kChunk)
      for (int64_t h = 0; h < count; ++h) heads[h].reverse_chunk(first, heads, h, count);
    for (int64_t h = 0; h < count; ++h) heads[h].finish_reverse();
  }

 private:
  void start_forward() const {
    start_state(task_.initial, task_.latents, task_.dim, width_, norm_, forward_state_, true);
  }
  void finish_forward() const {
    finish_state(task_.final, task_.latents, task_.dim, norm_, forward_state_, false, true);
  }
  void start_reverse() {
    clear_carry();
    task_.carry_in.norm ? load_carry() : seed();
  }
  void finish_reverse() {
    if (task_.carry_out.norm) store_carry();
    if (begin_ == 0) initial_gradient();
  }
  int64_t tokens_in_chunk(int64_t first) const {
    return end_ - first < kChunk ? end_ - first : kChunk;
  }
  // Its first row; before begin_ if there is none.
  int64_t last_chunk() const {
    return end_ == begin_ ? begin_ - 1 : begin_ + (end_ - begin_ - 1) / kChunk * kChunk;
  }
  // r and z before a chunk.
  T* border(int64_t first) const { return borders_ + first / kChunk * 2 * width_; }

  Prepared<T> prepared() {
    Prepared<T> out;
    out.ew = s_.ew;
    out.blocked = s_.weights;
    out.p = s_.p;
    out.w = s_.w;
    out.inverse_z = s_.inverse_z;
    out.inverse_sums = s_.inverse_sums;
    out.row_stride = stride_;
    out.alpha = s_.alpha;
    out.limit = s_.limit;
    out.runs = &runs_;
    return out;
  }

  template <Operands kOperands>
  Keys prepare_chunk(int64_t first, int64_t n) {
    softmax_of(q_, first, n, width_, s_.q, s_.p, stride_, s_.inverse_sums);
    const RowsInUse<T> ks(k_, first, n, s_.k, stride_);
    return prepare<T, kOperands>(n, width_, ks.data, ks.stride, norm_, prepared());
  }

  // Of this head, which is heads[h] of so many that are walked together.
  void forward_chunk(int64_t first, const CausalBackward* heads, int64_t h, int64_t count) {
    const int64_t n = tokens_in_chunk(first);
    __builtin_memcpy(border(first), h_.r, width_ * sizeof(T));
    __builtin_memcpy(border(first) + width_, h_.z, width_ * sizeof(T));
    const Keys keys = prepare_chunk<Operands::gradient_forward>(first, n);
    if (keys == Keys::raised) forward_state_.scale_columns(s_.alpha);
    PrefetchList list(tile_count(forward_state_));
    ScanOperands<T> scan = scan_operands(n, forward_state_, s_.u);
    scan.x = row_operand(v_, first, n, s_.v, value_stride_);
    scan.g = row_operand(dy_, first, n, s_.dy, value_stride_);
    scan.y = columns<const T>(s_.weights);
    scan.alpha = s_.alpha;
    scan.runs = &runs_;
    const int64_t next = first + kChunk;
    list.add_next(heads, h, count, first, next, next >= end_, &Head::k_, &Head::q_, &Head::v_,
                  &Head::dy_, &Head::dk_, &Head::dq_);
    scan.prefetch = &list;
    if (keys == Keys::rising) {
      scan_tiles<T, Part::both, Decay::columns_before>(scan);
    } else if (keys == Keys::tied) {
      // R^T is not in use before pass R.
      scan_tied(scan, r_transposed_);
    } else {
      scan_tiles<T, Part::both, Decay::none>(scan);
    }
    query_gradient(first, n);
  }

  // dq of a chunk from u z, and w u for pass R.
  void query_gradient(int64_t first, int64_t n) {
    const RowsResult<T> dq(dq_, first, s_.dq, stride_);
    const T scale = T(task_.scale);
    alignas(64) T means[kChunk];
    row_products(n, width_, s_.w, stride_, s_.u, means);
    for (int64_t t = 0; t < n; ++t) {
      const T *w = s_.w + t * stride_, *p = s_.p + t * stride_, *iz = s_.inverse_z + t * stride_;
      T *dq_row = dq.data + t * dq.stride, *wu_row = wu_ + (first + t) * wu_stride_;
      const T mean = means[t] - log_sum_gradient<T>(task_, first + t);
      const T p_mean = mean * s_.inverse_sums[t] * scale;
      for (int64_t l = 0; l < width_; l += kLanes<T>) {
        const Vec<T> pu = load(w + l) * load(blocked(s_.u, t, l));
        store(dq_row + l, pu * scale - load(p + l) * p_mean);
        store(wu_row + l, pu * load(iz + l));
      }
    }
    dq.flush(n);
  }

  void clear_carry() {
    r_state_.clear();
    r_transposed_.clear();
    for (int64_t l = 0; l < width_; ++l) {
      h_.c[l] = 0;
      h_.frame[l] = kLowest<T>;
    }
  }

  void load_carry() {
    const HeadState& carry = task_.carry_in;
    for (int64_t l = 0; l < task_.latents; ++l) {
      h_.frame[l] = read<T>(carry.max, l * carry.max_stride);
      h_.c[l] = read<T>(carry.norm, l * carry.norm_stride);
      for (int64_t i = 0; i < task_.dim; ++i) {
        const T r = read<T>(carry.mean, l * carry.mean_stride_l + i * carry.mean_stride_d);
        r_state_.at(l, i) = r;
        r_transposed_.at(i, l) = r;
      }
    }
  }

  // R and c at the stage's first token, and their frame.
  void store_carry() {
    const HeadState& carry = task_.carry_out;
    for (int64_t l = 0; l < task_.latents; ++l) {
      static_cast<T*>(carry.max)[l * carry.max_stride] = h_.frame[l];
      static_cast<T*>(carry.norm)[l * carry.norm_stride] = h_.c[l];
      for (int64_t i = 0; i < task_.dim; ++i)
        static_cast<T*>(carry.mean)[l * carry.mean_stride_l + i * carry.mean_stride_d] =
            r_state_.at(l, i);
    }
  }

  // R and c after the last token, in the frame of the final maximum, from the gradient of the final
  // state: R = d_mean / norm and c = d_norm - d_mean . mean / norm.
  void seed() {
    const HeadState &d = task_.d_final, &final = task_.final;
    if (!d.norm && !d.mean) return;
    for (int64_t l = 0; l < task_.latents; ++l) {
      const T norm = read<T>(final.norm, l * final.norm_stride);
      if (norm == 0) continue;
      T dot = 0;
      for (int64_t i = 0; d.mean && i < task_.dim; ++i) {
        const T g = read<T>(d.mean, l * d.mean_stride_l + i * d.mean_stride_d) / norm;
        r_state_.at(l, i) = g;
        r_transposed_.at(i, l) = g;
        dot += g * read<T>(final.mean, l * final.mean_stride_l + i * final.mean_stride_d);
      }
      h_.frame[l] = read<T>(final.max, l * final.max_stride);
      h_.c[l] = (d.norm ? read<T>(d.norm, l * d.norm_stride) : T(0)) - dot;
    }
  }

  // R and c grow with exp(reference): their frame is the one that they were summed in.
  void note_frame(Keys keys, int64_t first) {
    __builtin_memcpy(h_.frame, keys == Keys::rising ? border(first) : h_.r, width_ * sizeof(T));
  }
  // From there to the reference h_.r, which is never above: after the last chunk and where pass F
  // was cut the frame is a true maximum, and a chunk that was raised is above the chunk before.
  void enter_frame() {
    bool above = false;
    for (int64_t l = 0; l < width_; l += kLanes<T>)
      above |= any_greater(load(h_.frame + l), load(h_.r + l));
    if (!above) return;
    // u is free between two scans.
    for (int64_t l = 0; l < width_; l += kLanes<T>) {
      const Vec<T> factor = exp(min(Vec<T>{}, load(h_.r + l) - load(h_.frame + l)));
      store(blocked(s_.u, 0, l), factor);
      store(h_.c + l, load(h_.c + l) * factor);
    }
    r_state_.scale_rows(s_.u);
    r_transposed_.scale_columns(s_.u);
  }

  // Prepares a chunk from its border as pass F did, with R and c in its frame.
  Keys prepare_reverse(int64_t first, int64_t n) {
    __builtin_memcpy(h_.r, border(first), width_ * sizeof(T));
    __builtin_memcpy(h_.z, border(first) + width_, width_ * sizeof(T));
    const Keys keys = prepare_chunk<Operands::gradient_reverse>(first, n);
    enter_frame();
    return keys;
  }

  void reverse_chunk(int64_t first, const CausalBackward* heads, int64_t h, int64_t count) {
    const int64_t n = tokens_in_chunk(first);
    const Keys keys = prepare_reverse(first, n);
    const RowsInUse<T> dys(dy_, first, n, s_.dy, value_stride_, cpu::kMaxRowStride);
    PrefetchList list(tile_count(r_state_) + tile_count(r_transposed_));
    // R += w (x) dy, dv = e . R
    ScanOperands<T> scan = scan_operands(n, r_state_, s_.dv);
    scan.x = second_of_pair(s_.ew);
    scan.g = first_of_pair(s_.ew);
    scan.y = column_blocks_of(dys.data, dys.stride);
    write_in_place(scan, dv_, first);
    // R^T += dy (x) w, v . R
    ScanOperands<T> transposed = scan_operands(n, r_transposed_, s_.u);
    transposed.x = row_blocks_of(dys.data, dys.stride);
    transposed.g = row_operand(v_, first, n, s_.v, value_stride_);
    transposed.y = columns<const T>(s_.weights);
    scan.reverse = transposed.reverse = true;
    scan.alpha = transposed.alpha = s_.alpha;
    scan.runs = transposed.runs = &runs_;
    const int64_t next = first - kChunk;
    list.add_next(heads, h, count, first, next, next < begin_, &Head::k_, &Head::q_, &Head::v_,
                  &Head::dy_, &Head::dk_, &Head::dv_);
    scan.prefetch = transposed.prefetch = &list;
    if (keys == Keys::rising) {
      scan_tiles<T, Part::both, Decay::rows_after>(scan);
      scan_tiles<T, Part::both, Decay::columns_after>(transposed);
      key_gradient<true>(first, n);
    } else {
      scan_tiles<T, Part::both, Decay::none>(scan);
      scan_tiles<T, Part::both, Decay::none>(transposed);
      key_gradient<false>(first, n);
    }
    note_frame(keys, first);
    flush_blocks(dv_, first, n, s_.dv);
  }

  // c before the chunk, without dk.
  template <bool kRise>
  void carry_queries(int64_t first, int64_t n) {
    for (int64_t l = 0; l < width_; l += kLanes<T>) {
      Vec<T> c = load(h_.c + l);
      for (int64_t t = n - 1, run = runs_.count - 1; t >= 0; --t) {
        c -= load(wu_ + (first + t) * wu_stride_ + l);
        if (kRise && t == runs_.first[run]) c *= load(blocked(s_.alpha, run--, l));
      }
      store(h_.c + l, c);
    }
  }

  // dk = e (v . R + c), walking c back through the chunk.
  template <bool kRise>
  void key_gradient(int64_t first, int64_t n) {
    const RowsResult<T> dk(dk_, first, s_.dk, stride_);
    const T scale = T(task_.scale);
    for (int64_t l = 0; l < width_; l += kLanes<T>) {
      Vec<T> c = load(h_.c + l);
      for (int64_t t = n - 1, run = runs_.count - 1; t >= 0; --t) {
        c -= load(wu_ + (first + t) * wu_stride_ + l);
        const Vec<T> vr = load(blocked(s_.u, t, l));
        store(dk.data + t * dk.stride + l, load_x(s_.ew, t, l) * (vr + c) * scale);
        if (kRise && t == runs_.first[run]) c *= load(blocked(s_.alpha, run--, l));
      }
      store(h_.c + l, c);
    }
    dk.flush(n);
  }

  // The initial state counts as one token at time 0: S_0 = norm mean, z_0 = norm in reference max.
  void initial_gradient() {
    const HeadState &d = task_.d_initial, &initial = task_.initial;
    if (!d.norm) return;
    if (end_ > 0) {
      __builtin_memcpy(h_.r, border(0), width_ * sizeof(T));
      enter_frame();
    }
    for (int64_t l = 0; l < task_.latents; ++l) {
      const T mass = read<T>(initial.norm, l * initial.norm_stride);
      const bool empty =
          mass == 0 || read<T>(initial.max, l * initial.max_stride) == -T(__builtin_inf());
      T d_norm = empty ? T(0) : h_.c[l];
      for (int64_t i = 0; i < task_.dim; ++i) {
        const T r = empty ? T(0) : r_state_.at(l, i);
        const T mean =
            empty ? T(0)
                  : read<T>(initial.mean, l * initial.mean_stride_l + i * initial.mean_stride_d);
        static_cast<T*>(d.mean)[l * d.mean_stride_l + i * d.mean_stride_d] = mass * r;
        d_norm += mean * r;
      }
      static_cast<T*>(d.norm)[l * d.norm_stride] = d_norm;
    }
  }

  const HeadTask& task_;
  const Sink<T> dq_, dk_, dv_;
  const CausalBackwardScratch<T>& s_;
  const typename CausalBackwardScratch<T>::Head& h_;
  const Source<T> q_ = logits_q<T>(task_), k_ = logits_k<T>(task_, task_.group);
  const Source<T> v_ = values<T>(task_, task_.group), dy_ = output_gradient<T>(task_);
  const int64_t begin_ = task_.begin * task_.group, end_ = task_.end * task_.group;
  const int64_t width_ = round_up<T>(task_.latents);
  const int64_t stride_ = padded_stride<T>(width_);
  const int64_t value_stride_ = padded_stride<T>(round_up<T>(task_.dim));
  const Normaliser<T> norm_{h_.r, h_.z, h_.top};
  const Tiles<T> forward_state_{h_.forward_state, task_.dim, task_.latents};
  const Tiles<T> r_state_{h_.r_state, task_.latents, task_.dim};
  const Tiles<T> r_transposed_{h_.r_transposed, task_.dim, task_.latents};
  T *borders_, *wu_;
  int64_t wu_stride_;
  Runs runs_;  // of the current chunk
};

template <class T>
inline void causal_backward(const HeadTask& task, Arena arena) {
  static_assert(cpu::kHeadsTogether == 8);
  const CausalBackwardScratch<T> scratch(arena, task);
  const auto head = [&](int64_t h) {
    h = h < task.together ? h : 0;
    return CausalBackward<T>((&task)[h], scratch, h);
  };
  CausalBackward<T> heads[] = {head(0), head(1), head(2), head(3),
                               head(4), head(5), head(6), head(7)};
  CausalBackward<T>::forward(heads, task.together);
  CausalBackward<T>::reverse(heads, task.together);
}

}  // namespace latte::LATTE_ISA
