// SPDX-License-Identifier: Apache-2.0
// Pairs of channels turned by angles that depend on the token alone: a table of the cosines and
// sines of some tokens, which stays in the second-level cache, then every head by it.
//
// Angles are float64, also for float32 rows: at position 1,000,000 a float32 angle is off by 0.03.
// With 8 heads of 64 channels the table is a sixth of the time (AVX-512).
#pragma once

#include "cpu/rotate_task.h"
#include "cpu/tiles.h"

namespace latte::LATTE_ISA {

using cpu::RotateTask;

template <class T>
class Rotation {
 public:
  Rotation(const RotateTask& task, Arena arena)
      : task_(task),
        width_(round_up<T>(task.pairs) * (task.interleaved ? 2 : 1)),
        table_(arena.take<T>(task.tokens * 2 * width_)),
        bytes_(arena.used()) {}
  int64_t bytes() const { return bytes_; }

  void run() {
    for (int64_t t = 0; t < task_.tokens; ++t) fill(t);
    with_storage_type(T(), task_.x.dtype, [&](auto* storage) { rotate_rows(storage); });
  }

 private:
  // Row t of the table: cosines, then sines. Of interleaved pairs both are there twice, the first
  // sine of a pair negated: y = x cos + (x with its neighbours swapped) sin.
  void fill(int64_t t) {
    T *cosines = table_ + t * 2 * width_, *sines = cosines + width_;
    const double* const rates = task_.rates;
    const int64_t pairs = round_up<T>(task_.pairs);
    const VecD position = splat(static_cast<double>(task_.position[t * task_.position_stride]));
    const T direction = task_.inverse ? -1 : 1;
    for (int64_t i = 0; i < pairs; i += kLanes<T>) {
      Vec<T> cosine, sine = direction * sin_cos_of(position, rates + i, cosine);
      if (task_.interleaved) {
        store(cosines + 2 * i, interleave_low(cosine, cosine));
        store(cosines + 2 * i + kLanes<T>, interleave_high(cosine, cosine));
        store(sines + 2 * i, interleave_low(-sine, sine));
        store(sines + 2 * i + kLanes<T>, interleave_high(-sine, sine));
      } else {
        store(cosines + i, cosine);
        store(sines + i, sine);
      }
    }
  }
  static LATTE_INLINE VecD sin_cos_of(VecD position, const double* rates, VecD& cosine) {
    return sin_cos(position * load(rates), cosine);
  }
  static LATTE_INLINE VecF sin_cos_of(VecD position, const double* rates, VecF& cosine) {
    return sin_cos(position * load(rates), position * load(rates + kLanes<double>), cosine);
  }

  template <class S>
  void rotate_rows(const S*) {
    const bool dense = task_.x.stride_c == 1 && task_.y.stride_c == 1;
    if (!dense) {
      for_each_row<S>([&](const S* x, S* y, const T* table) { strided_row(x, y, table); });
    } else if constexpr (sizeof(S) == sizeof(T)) {
      can_stream<S>() ? dense_rows<S, true>() : dense_rows<S, false>();
    } else {
      dense_rows<S, false>();
    }
  }
  template <class S, bool kStream>
  void dense_rows() {
    if (task_.interleaved) {
      for_each_row<S>([&](const S* x, S* y, const T* table) { neighbours<kStream>(x, y, table); });
    } else {
      for_each_row<S>([&](const S* x, S* y, const T* table) { halves<kStream>(x, y, table); });
    }
  }

  // In the order of x in memory: whole rows of heads, or whole runs of tokens.
  template <class S, class F>
  LATTE_INLINE void for_each_row(F f) const {
    const Rows x = task_.x, y = task_.y;
    const bool tokens_inside = magnitude(x.stride_t) <= magnitude(x.stride_g);
    const int64_t outer = tokens_inside ? task_.heads : task_.tokens;
    const int64_t inner = tokens_inside ? task_.tokens : task_.heads;
    for (int64_t i = 0; i < outer; ++i)
      for (int64_t j = 0; j < inner; ++j) {
        const int64_t t = tokens_inside ? j : i, g = tokens_inside ? i : j;
        f(static_cast<const S*>(x.data) + t * x.stride_t + g * x.stride_g,
          static_cast<S*>(y.data) + t * y.stride_t + g * y.stride_g, table_ + t * 2 * width_);
      }
  }
  static int64_t magnitude(int64_t x) { return x < 0 ? -x : x; }

  // Whole aligned vectors of y only.
  template <class S>
  bool can_stream() const {
    constexpr int64_t bytes = sizeof(S);
    const auto aligned = [](int64_t x) { return x % LATTE_VECTOR_BYTES == 0; };
    const int64_t vectors = (task_.interleaved ? 2 : 1) * task_.pairs;
    return task_.stream &&
           aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(task_.y.data))) &&
           aligned(task_.y.stride_t * bytes) && aligned(task_.y.stride_g * bytes) &&
           aligned(vectors * bytes);
  }
  template <bool kStream, class S>
  static LATTE_INLINE void write(S* p, Vec<T> x) {
    if constexpr (kStream) {
      stream(p, x);
    } else {
      store_compute(p, x);
    }
  }

  template <bool kStream, class S>
  LATTE_INLINE void halves(const S* x, S* y, const T* cosines) const {
    const T* const sines = cosines + width_;
    const int64_t pairs = task_.pairs, whole = pairs - pairs % kLanes<T>, rest = pairs - whole;
    for (int64_t i = 0; i < whole; i += kLanes<T>) {
      prefetch<3>(x + i + ahead<S>());
      prefetch<3>(x + pairs + i + ahead<S>());
      const Vec<T> a = load_compute(x + i), b = load_compute(x + pairs + i);
      const Vec<T> cosine = load(cosines + i), sine = load(sines + i);
      write<kStream>(y + i, a * cosine - b * sine);
      write<kStream>(y + pairs + i, a * sine + b * cosine);
    }
    if (rest) {
      const Vec<T> a = load_compute_part(x + whole, rest);
      const Vec<T> b = load_compute_part(x + pairs + whole, rest);
      const Vec<T> cosine = load(cosines + whole), sine = load(sines + whole);
      store_compute_part(y + whole, rest, a * cosine - b * sine);
      store_compute_part(y + pairs + whole, rest, a * sine + b * cosine);
    }
    copy_rest(x, y);
  }

  template <bool kStream, class S>
  LATTE_INLINE void neighbours(const S* x, S* y, const T* cosines) const {
    const T* const sines = cosines + width_;
    const int64_t width = 2 * task_.pairs, whole = width - width % kLanes<T>, rest = width - whole;
    for (int64_t c = 0; c < whole; c += kLanes<T>) {
      prefetch<3>(x + c + ahead<S>());
      const Vec<T> a = load_compute(x + c);
      write<kStream>(y + c, a * load(cosines + c) + swap_neighbours(a) * load(sines + c));
    }
    if (rest) {
      const Vec<T> a = load_compute_part(x + whole, rest);
      store_compute_part(y + whole, rest,
                         a * load(cosines + whole) + swap_neighbours(a) * load(sines + whole));
    }
    copy_rest(x, y);
  }

  template <class S>
  LATTE_INLINE void copy_rest(const S* x, S* y) const {
    for (int64_t c = 2 * task_.pairs; c < task_.channels; ++c) y[c] = x[c];
  }

  template <class S>
  void strided_row(const S* x, S* y, const T* cosines) const {
    const int64_t from = task_.x.stride_c, to = task_.y.stride_c, pairs = task_.pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t first = task_.interleaved ? 2 * i : i;
      const int64_t second = task_.interleaved ? 2 * i + 1 : pairs + i;
      const T cosine = cosines[first], sine = cosines[width_ + (task_.interleaved ? second : i)];
      const T a = to_compute(x[first * from]), b = to_compute(x[second * from]);
      from_compute(a * cosine - b * sine, y + first * to);
      from_compute(a * sine + b * cosine, y + second * to);
    }
    for (int64_t c = 2 * pairs; c < task_.channels; ++c) y[c * to] = x[c * from];
  }

  // Elements by which a row is ahead of itself with prefetches.
  template <class S>
  static constexpr int64_t ahead() {
    return cpu::kFetchBytes / static_cast<int64_t>(sizeof(S));
  }

  const RotateTask& task_;
  int64_t width_;
  T* table_;
  int64_t bytes_;
};

}  // namespace latte::LATTE_ISA
