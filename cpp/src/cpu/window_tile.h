// SPDX-License-Identifier: Apache-2.0
// Blocks of queries and their logits, [key][query], as windows and sinks have them.
#pragma once

#include "cpu/head.h"
#include "cpu/tile_product.h"
#include "cpu/window_task.h"

namespace latte::LATTE_ISA {

using cpu::kWindowKeys;
using cpu::kWindowQueries;
using cpu::WindowTask;

inline constexpr int64_t kQ = kWindowQueries;
inline constexpr int64_t kK = kWindowKeys;
// Two vectors of queries: the columns of one tile of logits.
template <class T>
inline constexpr int64_t kPair = 2 * kLanes<T>;

struct Clip {
  int64_t begin, end;
};
LATTE_INLINE Clip clip(int64_t begin, int64_t end, int64_t low, int64_t high) {
  return {begin < low ? low : begin, end > high ? high : end};
}

// Rows of queries (kQ x width), zero past the last, and their transpose in panels of two vectors.
template <class T>
LATTE_INLINE void transpose_queries(const T* rows, int64_t width, T* panels) {
  for (int64_t i = 0; i < kQ; i += kLanes<T>)
    for (int64_t c = 0; c < width; c += kLanes<T>)
      transpose_square(rows + i * width + c, width,
                       panels + (i / kPair<T> * width + c) * kPair<T> + i % kPair<T>, kPair<T>);
}
template <class T>
LATTE_INLINE void copy_queries(const Source<T>& source, int64_t first, int64_t n, int64_t width,
                               T* rows) {
  source.copy(first, n, rows, width);
  __builtin_memset(rows + n * width, 0, (kQ - n) * width * sizeof(T));
}

// Lane numbers.
template <class T>
LATTE_INLINE Vec<T> iota(int64_t first) {
  Vec<T> x;
  for (int64_t i = 0; i < kLanes<T>; ++i) x[i] = T(first + i);
  return x;
}

// Logits to softcap tanh(logit / softcap): rows [begin, end) of a pair of query vectors.
template <class T>
LATTE_INLINE void cap(int64_t begin, int64_t end, T softcap, T* logits) {
  const Vec<T> bound = splat(softcap), inverse = splat(1 / softcap);
  for (int64_t r = begin; r < end; ++r)
    for (int64_t c = 0; c < kPair<T>; c += kLanes<T>) {
      T* const p = logits + r * kQ + c;
      store(p, bound * tanh(load(p) * inverse));
    }
}

}  // namespace latte::LATTE_ISA
