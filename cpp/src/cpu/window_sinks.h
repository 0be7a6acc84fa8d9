// SPDX-License-Identifier: Apache-2.0
// Sinks of a window: a few keys, with queries of their own, that a token sees once its window does
// not hold them. They are one more block of keys under the same softmax, and stand transposed as
// those do; every query meets all of them, so that no band clips the products.
//
// The gradients of their keys and values are sums over all queries of a sequence. Each piece of the
// sequence has sums of its own, which a last kernel adds in order: the pieces depend on the shape
// alone, so that neither threads nor cuts change a bit.
#pragma once

#include "cpu/arena.h"
#include "cpu/window_tile.h"

namespace latte::LATTE_ISA {

// Rows of the sinks in whole tiles.
LATTE_INLINE int64_t sink_rows(const WindowTask& task) {
  return (task.sinks + kTileRows - 1) / kTileRows * kTileRows;
}

// a - b in [0, most], whatever the two are.
LATTE_INLINE int64_t bounded_difference(int64_t a, int64_t b, int64_t most) {
  int64_t difference;
  if (a <= b) return 0;
  return __builtin_sub_overflow(a, b, &difference) || difference > most ? most : difference;
}

// The sinks of one key/value head, packed, and the queries of one block that meet them.
template <class T>
class Sinks {
 public:
  Sinks(Arena& arena, const WindowTask& task)
      : task_(task), key_width_(round_up<T>(task.key_dim)), value_width_(round_up<T>(task.dim)) {
    if (task.sinks == 0) return;
    k_ = arena.take<T>(sink_rows(task) * key_width_);
    v_ = arena.take<T>(sink_rows(task) * value_width_);
    for (T** rows : {&q_, &panels_}) *rows = arena.take<T>(kQ * key_width_);
  }

  const T* q() const { return q_; }
  const T* k(int64_t sink) const { return k_ + sink * key_width_; }
  const T* v(int64_t sink) const { return v_ + sink * value_width_; }

  // Before anything else.
  void pack() const {
    if (task_.sinks == 0) return;
    pack_rows(task_.k_sink, task_.key_dim, key_width_, k_);
    pack_rows(task_.v_sink, task_.dim, value_width_, v_);
  }

  void load_queries(int64_t first, int64_t n, int64_t g) const {
    const Source<T> q(head_of<T>(task_.q_sink, g), PerRow::every, task_.key_dim, 1, T(0),
                      T(task_.scale));
    copy_queries(q, first, n, key_width_, q_);
    transpose_queries(q_, key_width_, panels_);
  }

  // Of `rows` sinks from `begin` on and the pair of query vectors that begins with query first + q;
  // -inf where the query does not see the sink.
  void logits(int64_t begin, int64_t rows, int64_t first, int64_t q, T* logits) const {
    for (int64_t r = 0; r < rows; r += kTileRows)
      multiply<T, Layout::by_row>({task_.key_dim, k(begin + r), key_width_,
                                   panels_ + q * key_width_, kPair<T>, logits + r * kQ, kQ, false},
                                  2);
    if (task_.softcap > 0) cap(0, rows, T(task_.softcap), logits);
    for (int64_t r = 0; task_.sink_position && r < rows; ++r)
      hide(task_.sink_position[(begin + r) * task_.sink_position_stride], task_.start + first + q,
           logits + r * kQ);
  }

 private:
  void pack_rows(const Rows& from, int64_t channels, int64_t width, T* rows) const {
    Source<T>(from, PerRow::every, channels, 1, T(0)).copy(0, task_.sinks, rows, width);
    __builtin_memset(rows + task_.sinks * width, 0,
                     (sink_rows(task_) - task_.sinks) * width * sizeof(T));
  }

  // The sink at `position` from the tokens [at, at + kPair) whose windows hold it.
  void hide(int64_t position, int64_t at, T* row) const {
    int64_t beyond;
    if (__builtin_add_overflow(at, task_.reach, &beyond)) beyond = INT64_MAX;
    const T end = T(bounded_difference(position, at - task_.reach, kPair<T>));
    const T begin = task_.causal ? T(0) : T(bounded_difference(position, beyond - 1, kPair<T>));
    if (begin >= end) return;
    for (int64_t c = 0; c < kPair<T>; c += kLanes<T>) {
      const Vec<T> lane = iota<T>(c), x = load(row + c);
      const Vec<T> low = select(lane < splat(begin), x, splat(kAbsentLogit<T>));
      store(row + c, select(lane >= splat(end), x, low));
    }
  }

  const WindowTask& task_;
  int64_t key_width_, value_width_;
  T *k_ = nullptr, *v_ = nullptr, *q_ = nullptr, *panels_ = nullptr;
};

// Sums for the gradients of keys and values, in whole tiles of rows.
template <class T>
struct SinkSums {
  int64_t key_size, value_size;
  T *dk, *dv;

  SinkSums(Arena& arena, const WindowTask& task)
      : key_size(sink_rows(task) * round_up<T>(task.key_dim)),
        value_size(sink_rows(task) * round_up<T>(task.dim)),
        dk(arena.take<T>(key_size)),
        dv(arena.take<T>(value_size)) {}

  void clear() const {
    __builtin_memset(dk, 0, key_size * sizeof(T));
    __builtin_memset(dv, 0, value_size * sizeof(T));
  }
};

// The sums of the piece that begins with query `first`.
template <class T>
LATTE_INLINE SinkSums<T> sums_of_piece(const WindowTask& task, int64_t first) {
  Arena arena(static_cast<char*>(task.sink_sums) + first / task.sink_piece * task.sink_sums_bytes);
  return SinkSums<T>(arena, task);
}

// dk_sink and dv_sink of one key/value head of a sequence, out of the sums of its pieces.
template <class T>
inline void sink_gradient(const WindowTask& task, Arena arena) {
  const SinkSums<T> total(arena, task);
  total.clear();
  for (int64_t first = 0; first < task.tokens; first += task.sink_piece) {
    const SinkSums<T> piece = sums_of_piece<T>(task, first);
    for (int64_t i = 0; i < total.key_size; i += kLanes<T>)
      store(total.dk + i, load(total.dk + i) + load(piece.dk + i));
    for (int64_t i = 0; i < total.value_size; i += kLanes<T>)
      store(total.dv + i, load(total.dv + i) + load(piece.dv + i));
  }
  const auto write = [&](const Rows& to, int64_t channels, const T* sums) {
    const Sink<T> sink(to, PerRow::every, channels, 1);
    const int64_t width = round_up<T>(channels);
    sink.write(0, task.sinks, [&](int64_t i, int64_t c) { return load(sums + i * width + c); });
  };
  write(task.dk_sink, task.key_dim, total.dk);
  write(task.dv_sink, task.dim, total.dv);
}

}  // namespace latte::LATTE_ISA
