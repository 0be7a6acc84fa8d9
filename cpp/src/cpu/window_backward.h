// SPDX-License-Identifier: Apache-2.0
// The gradient of window attention: with w_ts = softmax_s recomputed from the saved log of the sum,
//
//   dv_s = sum_t w_ts dy_t    ds_ts = w_ts (v_s . dy_t - dy_t . y_t)    dq_t = sum_s ds_ts k_s
//   dk_s = sum_t ds_ts q_t
//
// and a soft cap's slope 1 - (capped logit / softcap)^2 in ds.
//
// Blocks of queries in order, each against the blocks of keys that it sees; dk and dv stay with
// their block until the queries have left it behind. A sequence is cut by computing, for the
// queries beyond a cut, the part of dk and dv before it: sums keep their order, so that the cuts
// change no bit.
#pragma once

#include "cpu/window.h"

namespace latte::LATTE_ISA {

template <class T>
class WindowBackward {
 public:
  WindowBackward(Arena& arena, const WindowTask& task)
      : task_(task),
        band_(task),
        ring_(arena, task, true),
        sinks_(arena, task),
        key_width_(round_up<T>(task.key_dim)),
        value_width_(round_up<T>(task.dim)) {
    if (task.sinks > 0) dq_sink_ = arena.take<T>(kQ * key_width_);
    for (T** rows : {&q_, &q_panels_, &dq_}) *rows = arena.take<T>(kQ * key_width_);
    for (T** rows : {&dy_, &dy_panels_, &y_}) *rows = arena.take<T>(kQ * value_width_);
    for (T** products : {&weights_, &slopes_}) *products = arena.take<T>(kK * kQ);
    for (T** column : {&log_sum_, &delta_}) *column = arena.take<T>(kQ);
  }

  void run() {
    sinks_.pack();
    // Keys whose gradient is this task's: those of its own queries, and the first task's also the
    // past ones. Cuts are multiples of a block.
    own_ = {task_.begin == 0 ? 0 : band_.origin + task_.begin, band_.origin + task_.end};
    flushed_ = own_.begin / kK;
    const Clip reach = clip(task_.begin - band_.after, task_.end + band_.before, 0, task_.tokens);
    for (int64_t first = reach.begin / kQ * kQ; first < reach.end; first += kQ) {
      const bool own = first >= task_.begin && first < task_.end;
      const int64_t n = reach.end - first < kQ ? reach.end - first : kQ;
      block(first, n, own);
    }
    flush((own_.end + kK - 1) / kK);
  }

 private:
  void block(int64_t first, int64_t n, bool own) {
    const int64_t lo = band_.lowest(first), hi = band_.highest(first + n);
    flush(lo / kK);
    const Clip keys = own ? Clip{lo, hi} : clip(lo, hi, own_.begin, own_.end);
    const bool some = keys.begin < keys.end;
    if (some) ring_.pack(task_, lo, keys.end);
    for (int64_t g = 0; g < task_.group && (some || own); ++g) {
      if (own) __builtin_memset(dq_, 0, kQ * key_width_ * sizeof(T));
      if (some) {
        load_queries(first, n, g);
        expect(first, g);
        for (int64_t index = keys.begin / kK; index * kK < keys.end; ++index)
          this->keys(index, first, n, own);
      }
      if (!own) continue;
      write_queries(task_.dq, dq_, first, n, g);
      if (task_.sinks > 0) sinks(first, n, g);
    }
  }

  void write_queries(const Rows& to, const T* rows, int64_t first, int64_t n, int64_t g) const {
    const Sink<T> sink(head_of<T>(to, g), PerRow::every, task_.key_dim, 1);
    const Vec<T> scale = splat(T(task_.scale));
    sink.write(first, n,
               [&](int64_t i, int64_t c) { return load(rows + i * key_width_ + c) * scale; });
  }

  // What the next head, or the queries of the next block, will read.
  void expect(int64_t first, int64_t g) {
    prefetch_.clear();
    const bool same = g + 1 < task_.group;
    const int64_t next = same ? first : first + kQ;
    const int64_t last = next + kQ < task_.tokens ? next + kQ : task_.tokens;
    if (next >= last) return;
    const auto add = [&](const cpu::Rows& rows, int64_t channels) {
      prefetch_.add(RowView<T>(head_of<T>(rows, same ? g + 1 : 0), PerRow::every, channels, 1),
                    next, last);
    };
    add(task_.q, task_.key_dim);
    add(task_.dy, task_.dim);
    if (task_.sinks > 0) add(task_.q_sink, task_.key_dim);
    if (!task_.share.data) add(task_.local, task_.dim);
    if (!same) ring_.expect(task_, band_.highest(last), prefetch_);
    prefetch_.pace(2 * band_.tiles<T>());
  }

  void load_queries(int64_t first, int64_t n, int64_t g) {
    const Source<T> q(head_of<T>(task_.q, g), PerRow::every, task_.key_dim, 1, T(0),
                      T(task_.scale));
    const Source<T> dy(head_of<T>(task_.dy, g), PerRow::every, task_.dim, 1, T(0));
    copy_queries(q, first, n, key_width_, q_);
    copy_queries(dy, first, n, value_width_, dy_);
    // A query that sees no key, and one past the last, has no weights.
    for (int64_t i = 0; i < kQ; ++i) {
      log_sum_[i] = -kAbsentLogit<T>;
      delta_[i] = 0;
    }
    for (int64_t i = 0; i < n; ++i) {
      const T log_sum = at<T>(task_.log_sum, first + i, g);
      if (log_sum != kAbsentLogit<T>) log_sum_[i] = log_sum;
    }
    if (task_.share.data) {
      for (int64_t i = 0; i < n; ++i) {
        const T share = at<T>(task_.share, first + i, g);
        delta_[i] = at<T>(task_.delta, first + i, g);
        for (int64_t c = 0; c < value_width_; c += kLanes<T>)
          store(dy_ + i * value_width_ + c, load(dy_ + i * value_width_ + c) * share);
      }
    } else {
      const Source<T> y(head_of<T>(task_.local, g), PerRow::every, task_.dim, 1, T(0));
      const RowsInUse<T> ys(y, first, n, y_, value_width_);
      for (int64_t i = 0; i < n; ++i) {
        delta_[i] = reduce_add<T>(
            lane_products(dy_ + i * value_width_, ys.data + i * ys.stride, value_width_));
        if (task_.d_log_sum.data) delta_[i] -= at<T>(task_.d_log_sum, first + i, g);
      }
    }
    transpose_queries(q_, key_width_, q_panels_);
    transpose_queries(dy_, value_width_, dy_panels_);
  }

  void keys(int64_t index, int64_t first, int64_t n, bool own_queries) {
    const KeyBlock<T> block = ring_[index];
    const bool own_keys = index * kK >= own_.begin && index * kK < own_.end;
    Clip all = {kK, 0};
    for (int64_t q = 0; q < n; q += kPair<T>) {
      const auto [begin, end] = band_.template pair_rows<T>(index, first + q);
      if (begin >= end) continue;
      key_products(band_, index, first + q, {begin, end}, key_width_, task_.key_dim, block.k,
                   q_panels_ + q * key_width_, weights_ + q, prefetch_);
      key_products(band_, index, first + q, {begin, end}, value_width_, task_.dim, block.v,
                   dy_panels_ + q * value_width_, slopes_ + q, prefetch_);
      if (task_.softcap > 0) cap(begin, end, T(task_.softcap), weights_ + q);
      hide(band_, block, index, first + q, begin, end, weights_ + q);
      weigh_keys(begin, end, q);
      all = {begin < all.begin ? begin : all.begin, end > all.end ? end : all.end};
    }
    if (own_keys) {
      for (int64_t r = all.begin; r < all.end; r += kTileRows) {
        const int64_t key = index * kK + r;
        const Clip t = clip(band_.from(first, key), band_.to(first, key + kTileRows - 1), 0, n);
        if (t.begin >= t.end) continue;
        add_rows(t, r, weights_, dy_, value_width_, block.dv);
        add_rows(t, r, slopes_, q_, key_width_, block.dk);
      }
    }
    if (!own_queries) return;
    for (int64_t q = 0; q < n; q += kTileRows) {
      const Clip seen = band_.rows(index, first + q, first + q + kTileRows);
      if (seen.begin >= seen.end) continue;
      multiply<T, Layout::by_column>(
          {seen.end - seen.begin, slopes_ + seen.begin * kQ + q, kQ,
           block.k + seen.begin * key_width_, key_width_, dq_ + q * key_width_, key_width_, true},
          key_width_ / kLanes<T>);
    }
  }

  // What the queries that are loaded give to the sinks, and these to them.
  void sinks(int64_t first, int64_t n, int64_t g) {
    const SinkSums<T> sums = sums_of_piece<T>(task_, first);
    if (g == 0 && first % task_.sink_piece == 0) sums.clear();
    sinks_.load_queries(first, n, g);
    for (int64_t begin = 0; begin < task_.sinks; begin += kK) {
      const int64_t rows = task_.sinks - begin < kK ? task_.sinks - begin : kK;
      for (int64_t q = 0; q < n; q += kPair<T>) {
        sinks_.logits(begin, rows, first, q, weights_ + q);
        for (int64_t r = 0; r < rows; r += kTileRows)
          multiply<T, Layout::by_row>(
              {task_.dim, sinks_.v(begin + r), value_width_, dy_panels_ + q * value_width_,
               kPair<T>, slopes_ + r * kQ + q, kQ, false},
              2);
        weigh_keys(0, rows, q);
      }
      for (int64_t r = 0; r < rows; r += kTileRows) {
        add_rows({0, n}, r, weights_, dy_, value_width_, sums.dv + begin * value_width_);
        add_rows({0, n}, r, slopes_, sinks_.q(), key_width_, sums.dk + begin * key_width_);
      }
      for (int64_t q = 0; q < n; q += kTileRows)
        multiply<T, Layout::by_column>({rows, slopes_ + q, kQ, sinks_.k(begin), key_width_,
                                        dq_sink_ + q * key_width_, key_width_, begin > 0},
                                       key_width_ / kLanes<T>);
    }
    write_queries(task_.dq_sink, dq_sink_, first, n, g);
  }

  void add_rows(Clip t, int64_t r, const T* products, const T* rows, int64_t width, T* sums) {
    multiply<T, Layout::by_row>({t.end - t.begin, products + r * kQ + t.begin, kQ,
                                 rows + t.begin * width, width, sums + r * width, width, true},
                                width / kLanes<T>);
  }

  void weigh_keys(int64_t begin, int64_t end, int64_t q) {
    task_.softcap > 0 ? weigh<true>(begin, end, q) : weigh<false>(begin, end, q);
  }

  // weights_: logits to w; slopes_: v . dy to ds.
  template <bool kCapped>
  void weigh(int64_t begin, int64_t end, int64_t q) {
    constexpr int64_t lanes = kLanes<T>;
    const Vec<T> lowest = splat(T(-task_.softcap)), inverse = splat(T(1 / task_.softcap));
    Vec<T> log_sum[2], delta[2];
    for (int j = 0; j < 2; ++j) {
      log_sum[j] = load(log_sum_ + q + j * lanes);
      delta[j] = load(delta_ + q + j * lanes);
    }
    for (int64_t r = begin; r < end; ++r)
      for (int j = 0; j < 2; ++j) {
        T *const w = weights_ + r * kQ + q + j * lanes, *const s = slopes_ + r * kQ + q + j * lanes;
        const Vec<T> logit = load(w), weight = exp(logit - log_sum[j]);
        Vec<T> slope = weight * (load(s) - delta[j]);
        if constexpr (kCapped) {
          // A hidden key's -inf would make 0 * inf of its weight.
          const Vec<T> share = max(lowest, logit) * inverse;
          slope *= 1 - share * share;
        }
        store(w, weight);
        store(s, slope);
      }
  }

  // Writes dk and dv of the own blocks before `block`.
  void flush(int64_t block) {
    const int64_t last = (own_.end + kK - 1) / kK;
    for (; flushed_ < block && flushed_ < last; ++flushed_) {
      const KeyBlock<T> keys = ring_[flushed_];
      const int64_t shift = flushed_ * kK - band_.pad;
      const Clip rows = clip(-shift, task_.keys - shift, 0, kK);
      if (rows.begin >= rows.end) continue;
      if (!ring_.was_packed(flushed_)) {  // no query came by
        __builtin_memset(keys.dk, 0, kK * key_width_ * sizeof(T));
        __builtin_memset(keys.dv, 0, kK * value_width_ * sizeof(T));
      }
      if (task_.more_dv.data) {
        const Source<T> more(task_.more_dv, PerRow::every, task_.dim, 1, T(0));
        more.for_each_vector(shift + rows.begin, rows.end - rows.begin,
                             [&](int64_t i, int64_t c, Vec<T> x) {
                               T* const p = keys.dv + (rows.begin + i) * value_width_ + c;
                               store(p, load(p) + x);
                             });
      }
      write(task_.dk, task_.key_dim, shift, rows, keys.dk, key_width_);
      write(task_.dv, task_.dim, shift, rows, keys.dv, value_width_);
    }
  }

  void write(const Rows& to, int64_t channels, int64_t shift, Clip rows, const T* sums,
             int64_t width) const {
    const Sink<T> sink(to, PerRow::every, channels, 1);
    sink.write(shift + rows.begin, rows.end - rows.begin,
               [&](int64_t i, int64_t c) { return load(sums + (rows.begin + i) * width + c); });
  }

  const WindowTask& task_;
  const Band band_;
  KeyRing<T> ring_;
  Sinks<T> sinks_;
  RowPrefetch prefetch_;
  int64_t key_width_, value_width_, flushed_ = 0;
  Clip own_ = {0, 0};
  T *q_, *q_panels_, *dq_, *dy_, *dy_panels_, *y_, *weights_, *slopes_, *log_sum_, *delta_;
  T* dq_sink_ = nullptr;
};

}  // namespace latte::LATTE_ISA
