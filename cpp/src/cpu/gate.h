// SPDX-License-Identifier: Apache-2.0
// The gate between a window and the latents: per token the softmax over 1 + L logits, of which only
// the probability of column 0 and the sum of the others matter here. The latents' own softmax over
// columns 1.. and the window's over its keys are each normalised, so
//
//   y = share * local + rest * global        share = p(0|t), rest = sum_(l>=1) p(l|t)
//
// is exact, and with d = share (<dy, local> - <dy, y>) the gradient of column 0 is d and that of
// the log of the latents' sum -d.
#pragma once

#include "cpu/head.h"
#include "cpu/window_task.h"

namespace latte::LATTE_ISA {

using cpu::Column;
using cpu::WindowTask;

// The latents' columns of a row in whole vectors; never none, so that there is a row to read.
template <class T, class Task>
LATTE_INLINE int64_t gate_width(const Task& task) {
  return round_up<T>(task.latents > 0 ? task.latents : 1);
}
template <class T, class Task>
LATTE_INLINE int64_t gate_size(const Task& task) {
  return cpu::kWindowQueries * gate_width<T>(task);
}
// The same rows from column 1 on.
template <class T>
LATTE_INLINE cpu::Rows behind_gate(cpu::Rows rows) {
  rows.data = static_cast<T*>(rows.data) + rows.stride_c;
  return rows;
}
// Rows of query head g within the group.
template <class T>
LATTE_INLINE cpu::Rows head_of(cpu::Rows rows, int64_t g) {
  const bool is_half = rows.dtype == DType::bfloat16 || rows.dtype == DType::float16;
  const int64_t bytes = is_half ? 2 : static_cast<int64_t>(sizeof(T));
  if (rows.data) rows.data = static_cast<char*>(rows.data) + g * rows.stride_g * bytes;
  return rows;
}

// share and rest of n <= kWindowQueries rows, which are of the compute type. A row that is -inf
// throughout has neither.
template <class T, class Task>
inline void gate_rows(const Task& task, int64_t g, int64_t first, int64_t n, T* rows, T* share,
                      T* rest) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t width = gate_width<T>(task);
  const cpu::Rows all = head_of<T>(task.gate, g);
  const Source<T> source(behind_gate<T>(all), PerRow::every, task.latents, 1, kAbsentLogit<T>,
                         T(task.gate_scale));
  if (task.latents == 0)
    for (int64_t i = 0; i < n * width; i += lanes) store(rows + i, splat(kAbsentLogit<T>));
  const RowsInUse<T> latents =
      task.latents > 0 ? RowsInUse<T>(source, first, n, rows, width) : RowsInUse<T>(rows, width);
  alignas(64) T zeroth[cpu::kWindowQueries] = {};
  alignas(64) Vec<T> sums[cpu::kWindowQueries];
  for (int64_t i = n; i < cpu::kWindowQueries; ++i) sums[i] = Vec<T>{};
  for (int64_t i = 0; i < n; ++i) {
    const T* const row = latents.data + i * latents.stride;
    const T own = static_cast<const T*>(all.data)[(first + i) * all.stride_t] * T(task.gate_scale);
    Vec<T> m = splat(own);
    for (int64_t c = 0; c < width; c += lanes) m = max(m, load(row + c));
    const T highest = reduce_max<T>(m);
    const T top = highest >= kLowest<T> || highest != highest ? highest : T(0);
    zeroth[i] = own - top;
    Vec<T> sum = {};
    for (int64_t c = 0; c < width; c += lanes) {
      sum += exp(load(row + c) - splat(top));
    }
    sums[i] = sum;
  }
  for (int64_t i = 0; i < n; i += lanes) {
    const Vec<T> others = sums_of<T>(sums + i), own = exp(load(zeroth + i));
    const Vec<T> sum = others + own;
    const Vec<T> inverse = select(sum == Vec<T>{}, Vec<T>{}, 1 / sum);
    store(share + i, own * inverse);
    store(rest + i, others * inverse);
  }
}

template <class T>
struct GateScratch {
  T *gate, *dy, *y, *local, *share, *rest;

  GateScratch(Arena& arena, const WindowTask& task) {
    gate = arena.take<T>(gate_size<T>(task));
    for (T** rows : {&dy, &y, &local})
      *rows = arena.take<T>(cpu::kWindowQueries * round_up<T>(task.dim));
    for (T** column : {&share, &rest}) *column = arena.take<T>(cpu::kWindowQueries);
  }
};

// The sum over a row of a * b, still spread over the lanes.
template <class T>
LATTE_INLINE Vec<T> lane_products(const T* a, const T* b, int64_t width) {
  Vec<T> sum = {};
  for (int64_t c = 0; c < width; c += kLanes<T>) sum += load(a + c) * load(b + c);
  return sum;
}

// What the two branches need to go back on their own, of query head 0 of the group.
template <class T>
inline void gate_gradient(const WindowTask& task, Arena arena) {
  constexpr int64_t lanes = kLanes<T>;
  const GateScratch<T> s(arena, task);
  const int64_t width = round_up<T>(task.dim);
  const Source<T> dy(task.dy, PerRow::every, task.dim, 1, T(0));
  const Source<T> y(task.global, PerRow::every, task.dim, 1, T(0));
  const Source<T> local(task.local, PerRow::every, task.dim, 1, T(0));
  const Sink<T> d_global(task.d_global, PerRow::every, task.dim, 1);
  for (int64_t first = task.begin; first < task.end; first += cpu::kWindowQueries) {
    const int64_t left = task.end - first;
    const int64_t n = left < cpu::kWindowQueries ? left : cpu::kWindowQueries;
    const RowsInUse<T> dys(dy, first, n, s.dy, width), ys(y, first, n, s.y, width),
        locals(local, first, n, s.local, width);
    gate_rows<T>(task, 0, first, n, s.gate, s.share, s.rest);
    for (int64_t group = 0; group < n; group += lanes) {
      const int64_t count = n - group < lanes ? n - group : lanes;
      Vec<T> along_local[lanes], along_y[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) along_local[i] = along_y[i] = Vec<T>{};
      for (int64_t i = 0; i < count; ++i) {
        const T* const row = dys.data + (group + i) * dys.stride;
        along_local[i] = lane_products(row, locals.data + (group + i) * locals.stride, width);
        along_y[i] = lane_products(row, ys.data + (group + i) * ys.stride, width);
      }
      const Vec<T> share = load(s.share + group), of_local = sums_of<T>(along_local);
      const Vec<T> delta = share * of_local, d = share * (of_local - sums_of<T>(along_y));
      for (int64_t i = 0; i < count; ++i) {
        at<T>(task.share, first + group + i, 0) = share[i];
        at<T>(task.delta, first + group + i, 0) = delta[i];
        at<T>(task.d_latents, first + group + i, 0) = -d[i];
        static_cast<T*>(task.d_zeroth.data)[(first + group + i) * task.d_zeroth.stride_t] =
            T(task.gate_scale) * d[i];
      }
    }
    if (task.d_global.data)
      d_global.write(first, n, [&](int64_t i, int64_t c) {
        return load(dys.data + i * dys.stride + c) * s.rest[i];
      });
  }
}

}  // namespace latte::LATTE_ISA
