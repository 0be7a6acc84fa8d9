// SPDX-License-Identifier: Apache-2.0
// One token of one key/value head, state updated in place:
//
//   max' = max(max, k)    norm' = norm exp(max - max') + exp(k - max')
//   alpha = exp(k - max') / norm'    mean += alpha (x) (v - mean)    y = softmax(q) . mean
//
// Bound by the traffic of the state: every mean is read and written once, the first query head
// reads it while it is in registers.
#pragma once

#include "cpu/head.h"

namespace latte::LATTE_ISA {

template <class T>
struct StepScratch {
  T *q, *k, *p, *alpha, *max, *norm, *v, *y;

  StepScratch(Arena& arena, const HeadTask& task) {
    const int64_t width = round_up<T>(task.latents);
    for (T** row : {&k, &alpha, &max, &norm}) *row = arena.take<T>(width);
    for (T** rows : {&q, &p}) *rows = arena.take<T>(task.group * width);
    v = arena.take<T>(round_up<T>(task.dim));
    y = arena.take<T>(task.group * round_up<T>(task.dim));
  }
};

// A row of numbers in the compute type.
template <class T>
LATTE_INLINE Rows numbers(void* data, int64_t stride) {
  return {data, kComputeDType<T>, 0, 0, stride};
}

template <class T>
LATTE_INLINE void step_normaliser(const HeadTask& task, const StepScratch<T>& s, int64_t width) {
  const Rows tops = numbers<T>(task.initial.max, task.initial.max_stride);
  const Rows norms = numbers<T>(task.initial.norm, task.initial.norm_stride);
  Source<T>(tops, PerRow::every, task.latents, 1, kAbsentLogit<T>).copy(0, 1, s.max, width);
  Source<T>(norms, PerRow::every, task.latents, 1, T(0)).copy(0, 1, s.norm, width);
  for (int64_t l = 0; l < width; l += kLanes<T>) {
    const Vec<T> top = load(s.max + l), key = load(s.k + l);
    const Vec<T> raised = max(top, key);
    // Finite even while the latent is empty, so that -inf - reference is -inf and not NaN.
    const Vec<T> reference = max(splat(kLowest<T>), raised);
    const Vec<T> e = exp(key - reference);
    const Vec<T> norm = load(s.norm + l) * exp(top - reference) + e;
    store(s.max + l, raised);
    store(s.norm + l, norm);
    store(s.alpha + l, e * reciprocal(max(splat(kEmptyNorm<T>), norm)));
  }
  const auto write = [&](const Rows& rows, const T* from) {
    const Sink<T> sink(rows, PerRow::every, task.latents, 1);
    sink.write(0, 1, [&](int64_t, int64_t c) { return load(from + c); });
  };
  write(tops, s.max);
  write(norms, s.norm);
}

// Latents of a block of `kVectors` vectors of D: the mean moves towards v, y sums up on the way.
template <class T, int kVectors, bool kUpdate>
LATTE_INLINE void step_columns(const HeadTask& task, const T* alpha, const T* p, const T* v, T* y,
                               int64_t d) {
  Vec<T> value[kVectors], sum[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    value[j] = load(v + d + j * kLanes<T>);
    sum[j] = Vec<T>{};
  }
  T* row = static_cast<T*>(task.initial.mean) + d;
  const int64_t stride = task.initial.mean_stride_l;
  // Two latents per turn save 6 % at L = D = 64; four lose 20 % at L = D = 128 with AVX-512.
#pragma GCC unroll 2
  for (int64_t l = 0; l < task.latents; ++l, row += stride) {
    const Vec<T> a = splat(alpha[l]), weight = splat(p[l]);
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      Vec<T> mean = load(row + j * kLanes<T>);
      if constexpr (kUpdate) {
        mean += a * (value[j] - mean);
        store(row + j * kLanes<T>, mean);
      }
      sum[j] += weight * mean;
    }
  }
  for (int j = 0; j < kVectors; ++j) store(y + d + j * kLanes<T>, sum[j]);
}

template <class T, bool kUpdate>
inline void step_head(const HeadTask& task, const T* alpha, const T* p, const T* v, T* y) {
  const int64_t lanes = kLanes<T>;
  int64_t d = 0;
  if (task.initial.mean_stride_d == 1) {
    for (; d + 4 * lanes <= task.dim; d += 4 * lanes)
      step_columns<T, 4, kUpdate>(task, alpha, p, v, y, d);
    for (; d + lanes <= task.dim; d += lanes) step_columns<T, 1, kUpdate>(task, alpha, p, v, y, d);
  }
  for (; d < task.dim; ++d) {
    T* mean = static_cast<T*>(task.initial.mean) + d * task.initial.mean_stride_d;
    T sum = 0;
    for (int64_t l = 0; l < task.latents; ++l, mean += task.initial.mean_stride_l) {
      if constexpr (kUpdate) *mean += alpha[l] * (v[d] - *mean);
      sum += p[l] * *mean;
    }
    y[d] = sum;
  }
}

template <class T>
inline void step(const HeadTask& task, Arena arena) {
  const StepScratch<T> s(arena, task);
  const int64_t width = round_up<T>(task.latents), y_stride = round_up<T>(task.dim);
  logits_k<T>(task, 1).copy(0, 1, s.k, width);
  values<T>(task, 1).copy(0, 1, s.v, y_stride);
  logits_q<T>(task).copy(0, task.group, s.q, width);
  step_normaliser(task, s, width);
  for (int64_t g = 0; g < task.group; ++g) {
    T* const p = s.p + g * width;
    const T inverse_sum = softmax_row(width, s.q + g * width, p);
    for (int64_t l = 0; l < width; l += kLanes<T>) store(p + l, load(p + l) * inverse_sum);
    if (g == 0) {
      step_head<T, true>(task, s.alpha, p, s.v, s.y);
    } else {
      step_head<T, false>(task, s.alpha, p, s.v, s.y + g * y_stride);
    }
  }
  const Sink<T> y(task.y, PerRow::every, task.dim, task.group);
  y.write(0, task.group, [&](int64_t i, int64_t c) { return load(s.y + i * y_stride + c); });
}

}  // namespace latte::LATTE_ISA
