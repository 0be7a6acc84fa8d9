// SPDX-License-Identifier: Apache-2.0
// Attention to a window of keys, forward: for the query at key position p
//
//   y = sum_s w_s v_s / sum_s w_s    w_s = exp(scale q . k_s - m)    p - window < s <= p
//
// (or |p - s| < window), with the online softmax over blocks of keys. Logits stand transposed,
// [key][query]: only the queries are ever transposed, once per block, keys and values are read in
// their own rows, and the softmax runs down the columns without a reduction across lanes.
//
// The band is clipped to 8 keys x 1 vector of queries in the logits and to 8 queries x 1 key in
// their product with the values: at window 128 and 16 lanes 92 % of the operations are of the band.
// Key positions are shifted by less than a block so that query 0 stands at a block's first key.
#pragma once

#include "cpu/gate.h"
#include "cpu/window_sinks.h"

namespace latte::LATTE_ISA {

// Which keys which queries see, in shifted positions.
class Band {
 public:
  explicit Band(const WindowTask& task)
      : pad((kK - task.past % kK) % kK),
        origin(task.past + pad),
        total(task.keys + pad),
        before(task.window - 1),
        after(task.causal ? 0 : task.window - 1) {}

  // Keys that some query of [first, last) sees: [lowest, highest).
  int64_t lowest(int64_t first) const {
    const int64_t lo = origin + first - before;
    return lo < pad ? pad : lo;
  }
  int64_t highest(int64_t last) const {
    const int64_t hi = origin + last + after;
    return hi > total ? total : hi;
  }
  // The rows of block `index` that some query of [first, last) sees.
  Clip rows(int64_t index, int64_t first, int64_t last) const {
    return clip(lowest(first) - index * kK, highest(last) - index * kK, 0, kK);
  }
  // Those of the pair of query vectors at `first`: of whole tiles, which meet them in products.
  template <class T>
  Clip pair_rows(int64_t index, int64_t first) const {
    const int64_t begin = first / kTileRows * kTileRows;
    const Clip seen = rows(index, begin, begin + (kPair<T> > kTileRows ? kPair<T> : kTileRows));
    return {seen.begin / kTileRows * kTileRows, (seen.end + kTileRows - 1) / kTileRows * kTileRows};
  }
  // Does every query of [first, last) see every key of [lo, hi)?
  bool whole(int64_t first, int64_t last, int64_t lo, int64_t hi) const {
    return hi - 1 <= origin + first + after && lo >= origin + last - 1 - before;
  }
  // The queries from `first` on that see the key: [from, to), not clipped.
  int64_t from(int64_t first, int64_t key) const { return key - origin - first - after; }
  int64_t to(int64_t first, int64_t key) const { return key - origin - first + before + 1; }

  // Tiles of logits of a block of queries, about.
  template <class T>
  int64_t tiles() const {
    return (kPair<T> + before + after) / kTileRows * (kQ / kPair<T>)+1;
  }
  // Blocks of keys that the queries of one block touch, at most.
  int64_t blocks() const {
    const int64_t n = (kQ + before + after) / kK + 2, all = total / kK + 1;
    return n < all ? n : all;
  }

  const int64_t pad, origin, total, before, after;
};

// A block of keys: rows of k and v in the compute type, zero where absent.
template <class T>
struct KeyBlock {
  T *k, *v, *dk, *dv;
  bool* hidden;  // per row, masked or outside of the sequence
  bool *any_hidden, *finite;
};

// Rows that the next block of queries will read, fetched a few lines at a time between the products
// of this one: read in a burst, they would each miss the caches (22 % of a forward pass).
class RowPrefetch {
 public:
  template <class T>
  void add(const RowView<T>& rows, int64_t first, int64_t end) {
    if (!rows.one_piece() || first >= end) return;
    pieces_[count_++] = {rows.row_address(first), rows.stride_bytes(), rows.row_bytes(),
                         end - first};
    rows_ += end - first;
  }
  // Spreads them over so many calls of some().
  void pace(int64_t calls) { pace_ = (rows_ + calls - 1) / calls; }
  LATTE_INLINE void some() {
    for (int64_t i = 0; i < pace_ && next_ < count_; ++i) {
      Piece& piece = pieces_[next_];
      for (int64_t byte = 0; byte < piece.bytes; byte += 64) prefetch<2>(piece.row + byte);
      piece.row += piece.stride;
      if (--piece.rows == 0) ++next_;
    }
  }
  void clear() { count_ = next_ = rows_ = 0; }

 private:
  struct Piece {
    const char* row;
    int64_t stride, bytes, rows;
  };
  Piece pieces_[8];
  int64_t count_ = 0, next_ = 0, rows_ = 0, pace_ = 0;
};

// The blocks in use, packed in order and reused in a ring.
template <class T>
class KeyRing {
 public:
  KeyRing(Arena& arena, const WindowTask& task, bool gradient)
      : band_(task),
        slots_(band_.blocks()),
        key_width_(round_up<T>(task.key_dim)),
        value_width_(round_up<T>(task.dim)) {
    k_ = arena.take<T>(slots_ * kK * key_width_);
    v_ = arena.take<T>(slots_ * kK * value_width_);
    if (gradient) {
      dk_ = arena.take<T>(slots_ * kK * key_width_);
      dv_ = arena.take<T>(slots_ * kK * value_width_);
    }
    hidden_ = arena.take<bool>(slots_ * (kK + 2));
  }

  KeyBlock<T> operator[](int64_t block) const {
    const int64_t row = block % slots_ * kK;
    bool* const flags = hidden_ + slots_ * kK + block % slots_ * 2;
    return {k_ + row * key_width_,
            v_ + row * value_width_,
            dk_ ? dk_ + row * key_width_ : nullptr,
            dv_ ? dv_ + row * value_width_ : nullptr,
            hidden_ + row,
            flags,
            flags + 1};
  }

  // Packs the blocks of the keys [lo, hi) that are not packed yet. Calls go forward without gaps.
  void pack(const WindowTask& task, int64_t lo, int64_t hi) {
    if (begin_ < 0) begin_ = end_ = lo / kK;
    for (; end_ * kK < hi; ++end_) pack_block(task, end_);
  }
  // The rows behind what is packed that the keys up to `hi` take.
  void expect(const WindowTask& task, int64_t hi, RowPrefetch& prefetch) const {
    const Clip rows = clip(end_ * kK - band_.pad, hi - band_.pad, 0, task.keys);
    prefetch.add(RowView<T>(task.k, PerRow::every, task.key_dim, 1), rows.begin, rows.end);
    prefetch.add(RowView<T>(task.v, PerRow::every, task.dim, 1), rows.begin, rows.end);
  }
  bool was_packed(int64_t block) const { return block >= begin_ && block < end_; }

 private:
  void pack_block(const WindowTask& task, int64_t index) {
    const KeyBlock<T> block = (*this)[index];
    const int64_t shift = index * kK - band_.pad;
    const Clip rows = clip(-shift, task.keys - shift, 0, kK);
    const int64_t n = rows.end > rows.begin ? rows.end - rows.begin : 0;
    if (n < kK) {
      __builtin_memset(block.k, 0, kK * key_width_ * sizeof(T));
      __builtin_memset(block.v, 0, kK * value_width_ * sizeof(T));
    }
    *block.any_hidden = n < kK;
    for (int64_t r = 0; r < kK; ++r) {
      const int64_t key = shift + r;
      block.hidden[r] = r < rows.begin || r >= rows.end ||
                        (task.key_mask && !task.key_mask[key * task.key_mask_stride]);
      *block.any_hidden |= block.hidden[r];
    }
    const Source<T> k(task.k, PerRow::every, task.key_dim, 1, T(0), T(1), task.key_mask,
                      task.key_mask_stride);
    const Source<T> v(task.v, PerRow::every, task.dim, 1, T(0), T(1), task.key_mask,
                      task.key_mask_stride);
    Vec<T> nothing = {};
    if (n > 0) {
      k.copy(shift + rows.begin, n, block.k + rows.begin * key_width_, key_width_);
      v.for_each_vector(shift + rows.begin, n, [&](int64_t i, int64_t c, Vec<T> x) {
        store(block.v + (rows.begin + i) * value_width_ + c, x);
        nothing += x - x;  // NaN where x is infinite or NaN
      });
    }
    *block.finite = reduce_add<T>(nothing) == 0;
    if (!dk_) return;
    __builtin_memset(block.dk, 0, kK * key_width_ * sizeof(T));
    __builtin_memset(block.dv, 0, kK * value_width_ * sizeof(T));
  }

  Band band_;
  int64_t slots_, key_width_, value_width_, begin_ = -1, end_ = 0;
  T *k_, *v_, *dk_ = nullptr, *dv_ = nullptr;
  bool* hidden_;
};

// products[r][q] = rows[r] . queries[q] for rows [begin, end) of block `index` and the pair of
// query vectors that begins with query `first`. A vector that sees none of a tile's keys is left
// out.
template <class T>
LATTE_INLINE void key_products(const Band& band, int64_t index, int64_t first, Clip rows,
                               int64_t width, int64_t channels, const T* keys, const T* panel,
                               T* products, RowPrefetch& prefetch) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t r = rows.begin; r < rows.end; r += kTileRows) {
    prefetch.some();
    const int64_t key = index * kK + r;
    // Of tiles that queries come in, which narrow vectors share.
    const Clip seen = clip(band.from(first, key) / kTileRows * kTileRows,
                           band.to(first, key + kTileRows - 1) + kTileRows - 1, 0, kPair<T>);
    const bool low = seen.begin<lanes, high = seen.end> lanes;
    const int64_t c = low ? 0 : lanes;
    multiply<T, Layout::by_row>(
        {channels, keys + r * width, width, panel + c, kPair<T>, products + r * kQ + c, kQ, false},
        low && high ? 2 : 1);
  }
}

// Logits out of the band, and of hidden keys, become -inf. Rows [begin, end) of block `index`, the
// pair of query vectors that begins with query `first`.
template <class T>
inline void hide(const Band& band, const KeyBlock<T>& block, int64_t index, int64_t first,
                 int64_t begin, int64_t end, T* logits) {
  for (int64_t tile = begin; tile < end; tile += kTileRows) {
    const int64_t key = index * kK + tile;
    if (!*block.any_hidden && band.whole(first, first + kPair<T>, key, key + kTileRows)) continue;
    for (int64_t r = tile; r < tile + kTileRows; ++r) {
      Clip seen =
          clip(band.from(first, index * kK + r), band.to(first, index * kK + r), 0, kPair<T>);
      if (block.hidden[r]) seen.end = 0;
      for (int64_t c = 0; c < kPair<T>; c += kLanes<T>) {
        T* const p = logits + r * kQ + c;
        const Vec<T> lane = iota<T>(c);
        const Vec<T> low = select(lane >= splat(T(seen.begin)), load(p), splat(kAbsentLogit<T>));
        store(p, select(lane < splat(T(seen.end)), low, splat(kAbsentLogit<T>)));
      }
    }
  }
}

template <class T>
class WindowForward {
 public:
  WindowForward(Arena& arena, const WindowTask& task)
      : task_(task),
        band_(task),
        ring_(arena, task, false),
        sinks_(arena, task),
        key_width_(round_up<T>(task.key_dim)),
        value_width_(round_up<T>(task.dim)) {
    rows_ = arena.take<T>(kQ * key_width_);
    queries_ = arena.take<T>(kQ * key_width_);
    weights_ = arena.take<T>(kK * kQ);
    sums_ = arena.take<T>(kQ * value_width_);
    for (T** column : {&top_, &norm_, &alpha_, &share_, &rest_}) *column = arena.take<T>(kQ);
    if (!task.gate.data) return;
    global_ = arena.take<T>(kQ * value_width_);
    gate_ = arena.take<T>(gate_size<T>(task));
  }

  void run() {
    sinks_.pack();
    for (int64_t first = task_.begin; first < task_.end; first += kQ)
      block(first, task_.end - first < kQ ? task_.end - first : kQ);
  }

 private:
  void block(int64_t first, int64_t n) {
    const Source<T> q(task_.q, PerRow::every, task_.key_dim, 1, T(0), T(task_.scale));
    copy_queries(q, first, n, key_width_, rows_);
    transpose_queries(rows_, key_width_, queries_);
    for (int64_t i = 0; i < kQ; i += kLanes<T>) {
      store(top_ + i, splat(kLowest<T>));
      store(norm_ + i, Vec<T>{});
    }
    __builtin_memset(sums_, 0, kQ * value_width_ * sizeof(T));
    if (task_.sinks > 0) sinks(first, n);
    const int64_t lo = band_.lowest(first), hi = band_.highest(first + n);
    if (lo < hi) {
      ring_.pack(task_, lo, hi);
      expect(first + kQ);
      for (int64_t index = lo / kK; index * kK < hi; ++index) keys(index, first, n);
    }
    finish(first, n);
  }

  // What the queries from `next` on will read.
  void expect(int64_t next) {
    prefetch_.clear();
    const int64_t last = next + kQ < task_.end ? next + kQ : task_.end;
    if (next >= last) return;
    prefetch_.add(RowView<T>(task_.q, PerRow::every, task_.key_dim, 1), next, last);
    if (task_.sinks > 0)
      prefetch_.add(RowView<T>(task_.q_sink, PerRow::every, task_.key_dim, 1), next, last);
    ring_.expect(task_, band_.highest(last), prefetch_);
    if (task_.gate.data) {
      prefetch_.add(RowView<T>(task_.gate, PerRow::every, 1 + task_.latents, 1), next, last);
      prefetch_.add(RowView<T>(task_.global, PerRow::every, task_.dim, 1), next, last);
    }
    prefetch_.pace(band_.tiles<T>());
  }

  // Before the keys: the first block of sinks then finds no sums to rescale.
  void sinks(int64_t first, int64_t n) {
    sinks_.load_queries(first, n, 0);
    for (int64_t begin = 0; begin < task_.sinks; begin += kK) {
      const int64_t rows = task_.sinks - begin < kK ? task_.sinks - begin : kK;
      for (int64_t q = 0; q < n; q += kPair<T>) {
        sinks_.logits(begin, rows, first, q, weights_ + q);
        weigh(0, rows, q);
      }
      if (begin > 0) rescale(n);
      for (int64_t q = 0; q < n; q += kTileRows)
        multiply<T, Layout::by_column>({rows, weights_ + q, kQ, sinks_.v(begin), value_width_,
                                        sums_ + q * value_width_, value_width_, true},
                                       value_width_ / kLanes<T>);
    }
  }

  void keys(int64_t index, int64_t first, int64_t n) {
    const KeyBlock<T> block = ring_[index];
    for (int64_t i = 0; i < kQ; i += kLanes<T>) store(alpha_ + i, splat(T(1)));
    for (int64_t q = 0; q < n; q += kPair<T>) {
      const auto [begin, end] = band_.template pair_rows<T>(index, first + q);
      if (begin >= end) continue;
      T* const logits = weights_ + q;
      key_products(band_, index, first + q, {begin, end}, key_width_, task_.key_dim, block.k,
                   queries_ + q * key_width_, logits, prefetch_);
      if (task_.softcap > 0) cap(begin, end, T(task_.softcap), logits);
      hide(band_, block, index, first + q, begin, end, logits);
      weigh(begin, end, q);
    }
    rescale(n);
    for (int64_t q = 0; q < n; q += kTileRows) {
      prefetch_.some();
      if (*block.finite) {
        add_values<kTileRows>(block, band_.rows(index, first + q, first + q + kTileRows), q);
      } else {
        // A weight of zero times NaN is NaN: each query meets the keys that it sees, no others.
        for (int64_t i = q; i < q + kTileRows; ++i)
          add_values<1>(block, band_.rows(index, first + i, first + i + 1), i);
      }
    }
  }

  // Logits to weights, in the frame of the larger maximum.
  void weigh(int64_t begin, int64_t end, int64_t q) {
    constexpr int64_t lanes = kLanes<T>;
    Vec<T> top[2], sum[2];
    for (int j = 0; j < 2; ++j) top[j] = load(top_ + q + j * lanes);
    for (int64_t r = begin; r < end; ++r)
      for (int j = 0; j < 2; ++j) top[j] = max(top[j], load(weights_ + r * kQ + q + j * lanes));
    for (int j = 0; j < 2; ++j) {
      T* const old = top_ + q + j * lanes;
      const Vec<T> alpha = exp(load(old) - top[j]);
      store(alpha_ + q + j * lanes, alpha);
      store(old, top[j]);
      sum[j] = load(norm_ + q + j * lanes) * alpha;
    }
    for (int64_t r = begin; r < end; ++r)
      for (int j = 0; j < 2; ++j) {
        T* const p = weights_ + r * kQ + q + j * lanes;
        const Vec<T> weight = exp(load(p) - top[j]);
        sum[j] += weight;
        store(p, weight);
      }
    for (int j = 0; j < 2; ++j) store(norm_ + q + j * lanes, sum[j]);
  }

  void rescale(int64_t n) {
    Vec<T> changed = {};
    for (int64_t i = 0; i < kQ; i += kLanes<T>)
      changed += select(load(alpha_ + i) == splat(T(1)), Vec<T>{}, splat(T(1)));
    if (!any_greater(changed, Vec<T>{})) return;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < value_width_; c += kLanes<T>) {
        T* const p = sums_ + i * value_width_ + c;
        store(p, load(p) * alpha_[i]);
      }
  }

  template <int kRows>
  void add_values(const KeyBlock<T>& block, Clip seen, int64_t q) {
    if (seen.begin >= seen.end) return;
    multiply<T, Layout::by_column, kRows>({seen.end - seen.begin, weights_ + seen.begin * kQ + q,
                                           kQ, block.v + seen.begin * value_width_, value_width_,
                                           sums_ + q * value_width_, value_width_, true},
                                          value_width_ / kLanes<T>);
  }

  void finish(int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const T norm = norm_[i];
      const T inverse = norm == 0 ? T(0) : 1 / norm;
      for (int64_t c = 0; c < value_width_; c += kLanes<T>) {
        T* const p = sums_ + i * value_width_ + c;
        store(p, load(p) * inverse);
      }
      if (task_.log_sum.data)
        static_cast<T*>(task_.log_sum.data)[(first + i) * task_.log_sum.stride_t] =
            norm == 0 ? kAbsentLogit<T> : top_[i] + log_scalar(norm);
    }
    write(task_.local, first, n);
    if (task_.gate.data) {
      // Without latents the rows have no meaning yet, and rest is zero.
      if (task_.latents == 0) __builtin_memset(global_, 0, kQ * value_width_ * sizeof(T));
      const Source<T> source(task_.global, PerRow::every, task_.dim, 1, T(0));
      const RowsInUse<T> global = task_.latents > 0
                                      ? RowsInUse<T>(source, first, n, global_, value_width_)
                                      : RowsInUse<T>(global_, value_width_);
      gate_rows<T>(task_, 0, first, n, gate_, share_, rest_);
      for (int64_t i = 0; i < n; ++i) {
        const Vec<T> share = splat(share_[i]), rest = splat(rest_[i]);
        for (int64_t c = 0; c < value_width_; c += kLanes<T>) {
          T* const p = sums_ + i * value_width_ + c;
          store(p, share * load(p) + rest * load(global.data + i * global.stride + c));
        }
      }
      write(task_.global, first, n);
    }
    write(task_.y, first, n);
  }

  void write(const Rows& rows, int64_t first, int64_t n) const {
    if (!rows.data) return;
    const Sink<T> sink(rows, PerRow::every, task_.dim, 1);
    sink.write(first, n, [&](int64_t i, int64_t c) { return load(sums_ + i * value_width_ + c); });
  }

  const WindowTask& task_;
  const Band band_;
  KeyRing<T> ring_;
  Sinks<T> sinks_;
  RowPrefetch prefetch_;
  int64_t key_width_, value_width_;
  T *rows_, *queries_, *weights_, *sums_, *top_, *norm_, *alpha_, *share_, *rest_;
  T *global_ = nullptr, *gate_ = nullptr;
};

}  // namespace latte::LATTE_ISA
