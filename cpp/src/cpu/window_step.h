// SPDX-License-Identifier: Apache-2.0
// One token of one key/value head: its key and value go to their slot of the ring, then its queries
// meet the slots and the sinks. Bound by the traffic of the ring, which every query head of the
// group reads while it is in cache.
#pragma once

#include "cpu/gate.h"
#include "cpu/tile_product.h"

namespace latte::LATTE_ISA {

using cpu::WindowStepTask;

inline constexpr int64_t kStepRows = 64;

template <class T>
struct WindowStepScratch {
  T *q, *q_sink, *rows, *logits, *y, *gate, *global, *share, *rest;
  int64_t key_width, value_width, slots, row_width;

  WindowStepScratch(Arena& arena, const WindowStepTask& task)
      : key_width(round_up<T>(task.key_dim)),
        value_width(round_up<T>(task.dim)),
        slots(round_up<T>(task.window) + round_up<T>(task.sinks)),
        row_width(key_width > value_width ? key_width : value_width) {
    q = arena.take<T>(key_width);
    q_sink = arena.take<T>(key_width);
    // Rows past the last are read and not used.
    rows = arena.take<T>((kStepRows + kLanes<T>)*row_width);
    logits = arena.take<T>(task.group * slots);
    y = arena.take<T>(task.group * value_width);
    if (!task.gate.data) return;
    gate = arena.take<T>(gate_size<T>(task));
    global = arena.take<T>(value_width);
    for (T** column : {&share, &rest}) *column = arena.take<T>(cpu::kWindowQueries);
  }
};

// Calls f(first, count, data, stride) for up to kStepRows rows at a time, in the compute type.
template <class T, class F>
LATTE_INLINE void for_each_rows(const cpu::Rows& rows, int64_t n, int64_t channels, T* scratch,
                                int64_t width, F f) {
  const Source<T> source(rows, PerRow::every, channels, 1, T(0));
  for (int64_t first = 0; first < n; first += kStepRows) {
    const int64_t count = n - first < kStepRows ? n - first : kStepRows;
    const RowsInUse<T> use(source, first, count, scratch, width);
    f(first, count, use.data, use.stride);
  }
}

// logits[i] = q . rows[i]
template <class T>
LATTE_INLINE void step_logits(int64_t n, const T* q, const T* rows, int64_t stride, int64_t width,
                              T* logits) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    Vec<T> dots[kLanes<T>];
#pragma GCC unroll 16
    for (int64_t j = 0; j < kLanes<T>; ++j) dots[j] = Vec<T>{};
    const int64_t count = n - i < kLanes<T> ? n - i : kLanes<T>;
    for (int64_t j = 0; j < count; ++j)
      for (int64_t c = 0; c < width; c += kLanes<T>)
        dots[j] += load(q + c) * load(rows + (i + j) * stride + c);
    store(logits + i, sums_of<T>(dots));
  }
}

// y += sum_i weights[i] rows[i], kVectors vectors of it, in two sums that keep the adders busy.
template <class T, int kVectors>
LATTE_INLINE void step_columns(int64_t n, const T* weights, const T* rows, int64_t stride, T* y) {
  Vec<T> even[kVectors], odd[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    even[j] = load(y + j * kLanes<T>);
    odd[j] = Vec<T>{};
  }
  int64_t i = 0;
  for (; i + 1 < n; i += 2, rows += 2 * stride) {
    const Vec<T> a = splat(weights[i]), b = splat(weights[i + 1]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      even[j] += a * load(rows + j * kLanes<T>);
      odd[j] += b * load(rows + stride + j * kLanes<T>);
    }
  }
  for (; i < n; ++i, rows += stride)
    for (int j = 0; j < kVectors; ++j) even[j] += splat(weights[i]) * load(rows + j * kLanes<T>);
  for (int j = 0; j < kVectors; ++j) store(y + j * kLanes<T>, even[j] + odd[j]);
}
template <class T>
LATTE_INLINE void step_values(int64_t n, const T* weights, const T* rows, int64_t stride,
                              int64_t width, T* y) {
  int64_t c = 0;
  for (; c + 4 * kLanes<T> <= width; c += 4 * kLanes<T>)
    step_columns<T, 4>(n, weights, rows + c, stride, y + c);
  for (; c < width; c += kLanes<T>) step_columns<T, 1>(n, weights, rows + c, stride, y + c);
}

template <class T>
inline void window_step(const WindowStepTask& task, Arena arena) {
  const WindowStepScratch<T> s(arena, task);
  const int64_t slot = task.position % task.window;
  const int64_t used = task.position + 1 < task.window ? task.position + 1 : task.window;
  const int64_t behind = round_up<T>(used);
  const auto put = [&](const cpu::Rows& from, const cpu::Rows& to, int64_t channels, T* row) {
    Source<T>(from, PerRow::every, channels, 1, T(0)).copy(0, 1, row, 0);
    Sink<T>(to, PerRow::every, channels, 1).write(slot, 1, [&](int64_t, int64_t c) {
      return load(row + c);
    });
  };
  put(task.k, task.k_ring, task.key_dim, s.rows);
  put(task.v, task.v_ring, task.dim, s.rows);

  const auto query = [&](const cpu::Rows& rows, int64_t g, T* row) {
    Source<T>(head_of<T>(rows, g), PerRow::every, task.key_dim, 1, T(0), T(task.scale))
        .copy(0, 1, row, 0);
  };
  const auto logits_of = [&](const cpu::Rows& q, const cpu::Rows& k, int64_t n, int64_t offset) {
    for_each_rows<T>(k, n, task.key_dim, s.rows, s.key_width,
                     [&](int64_t first, int64_t count, const T* rows, int64_t stride) {
                       for (int64_t g = 0; g < task.group; ++g) {
                         query(q, g, s.q);
                         step_logits(count, s.q, rows, stride, s.key_width,
                                     s.logits + g * s.slots + offset + first);
                       }
                     });
  };
  logits_of(task.q, task.k_ring, used, 0);
  if (task.sinks > 0) logits_of(task.q_sink, task.k_sink, task.sinks, behind);
  const int64_t all = behind + (task.sinks > 0 ? round_up<T>(task.sinks) : 0);

  for (int64_t g = 0; g < task.group; ++g) {
    T* const logits = s.logits + g * s.slots;
    const T softcap = T(task.softcap);
    for (int64_t i = 0; softcap > 0 && i < all; i += kLanes<T>)
      store(logits + i, softcap * tanh(load(logits + i) / softcap));
    for (int64_t i = 0; i < behind; ++i)
      if (i >= used || !task.valid[i * task.valid_stride]) logits[i] = kAbsentLogit<T>;
    for (int64_t i = behind; i < all; ++i) {
      const int64_t n = i - behind;
      if (n >= task.sinks ||
          (task.sink_position &&
           task.position - task.sink_position[n * task.sink_position_stride] < task.window))
        logits[i] = kAbsentLogit<T>;
    }
    const T inverse = softmax_row(all, logits, logits);
    for (int64_t i = 0; i < all; i += kLanes<T>) store(logits + i, load(logits + i) * inverse);
    for (int64_t c = 0; c < s.value_width; c += kLanes<T>)
      store(s.y + g * s.value_width + c, Vec<T>{});
  }

  const auto add_values = [&](const cpu::Rows& v, int64_t n, int64_t offset) {
    for_each_rows<T>(v, n, task.dim, s.rows, s.value_width,
                     [&](int64_t first, int64_t count, const T* rows, int64_t stride) {
                       for (int64_t g = 0; g < task.group; ++g)
                         step_values(count, s.logits + g * s.slots + offset + first, rows, stride,
                                     s.value_width, s.y + g * s.value_width);
                     });
  };
  add_values(task.v_ring, used, 0);
  if (task.sinks > 0) add_values(task.v_sink, task.sinks, behind);

  for (int64_t g = 0; task.gate.data && g < task.group; ++g) {
    T* const y = s.y + g * s.value_width;
    gate_rows<T>(task, g, 0, 1, s.gate, s.share, s.rest);
    for (int64_t c = 0; c < s.value_width; c += kLanes<T>) store(s.global + c, Vec<T>{});
    if (task.latents > 0)
      Source<T>(head_of<T>(task.global, g), PerRow::every, task.dim, 1, T(0))
          .copy(0, 1, s.global, 0);
    for (int64_t c = 0; c < s.value_width; c += kLanes<T>)
      store(y + c, load(y + c) * s.share[0] + load(s.global + c) * s.rest[0]);
  }
  for (int64_t g = 0; g < task.group; ++g)
    Sink<T>(head_of<T>(task.y, g), PerRow::every, task.dim, 1).write(0, 1, [&](int64_t, int64_t c) {
      return load(s.y + g * s.value_width + c);
    });
}

}  // namespace latte::LATTE_ISA
