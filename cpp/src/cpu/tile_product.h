// SPDX-License-Identifier: Apache-2.0
// Small matrix products C (+)= A B on operands in cache, B and C in rows of whole vectors. A is
// read one number at a time, so that its rows may lie in either direction.
#pragma once

#include "cpu/simd.h"

namespace latte::LATTE_ISA {

// Rows of C that one call computes: clipping a band to this many rows wastes little.
inline constexpr int64_t kTileRows = 8;
// Rows in registers: 8 x 2 accumulators of 32 registers, 4 x 2 of 16.
#if LATTE_VECTOR_BYTES == 64 || defined(__aarch64__)
inline constexpr int kRegisterRows = 8;
#else
inline constexpr int kRegisterRows = 4;
#endif

enum class Layout : bool {
  by_row,     // A(r, i) at a[r * step + i]
  by_column,  // A(r, i) at a[i * step + r]
};

template <class T>
struct Product {
  int64_t n;  // columns of A, rows of B
  const T* a;
  int64_t a_step;
  const T* b;
  int64_t b_step;
  T* c;
  int64_t c_step;
  bool add;  // C holds a first term
};

template <class T, Layout kLayout, int kRows, int kVectors>
inline void multiply_registers(const Product<T> p) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> c[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j)
      c[r][j] = p.add ? load(p.c + r * p.c_step + j * lanes) : Vec<T>{};
  const T *a = p.a, *b = p.b;
  const int64_t a_row = kLayout == Layout::by_row ? p.a_step : 1;
  for (int64_t i = 0; i < p.n; ++i) {
    Vec<T> row[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + j * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> x = splat(a[r * a_row]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) c[r][j] += x * row[j];
    }
    a += kLayout == Layout::by_row ? 1 : p.a_step;
    b += p.b_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) store(p.c + r * p.c_step + j * lanes, c[r][j]);
}

// kRows rows and `vectors` vectors of C.
template <class T, Layout kLayout, int kRows = kTileRows>
inline void multiply(Product<T> p, int64_t vectors) {
  constexpr int rows = kRows < kRegisterRows ? kRows : kRegisterRows;
  const T* const b = p.b;
  T* const c = p.c;
  for (int r = 0; r < kRows; r += rows) {
    for (int64_t j = 0; j < vectors; j += 2) {
      p.b = b + j * kLanes<T>;
      p.c = c + r * p.c_step + j * kLanes<T>;
      if (j + 1 < vectors) {
        multiply_registers<T, kLayout, rows, 2>(p);
      } else {
        multiply_registers<T, kLayout, rows, 1>(p);
      }
    }
    p.a += kLayout == Layout::by_row ? rows * p.a_step : rows;
  }
}

// The transpose of a square of lanes x lanes, by repeated perfect shuffles of its rows.
template <class T>
LATTE_INLINE void transpose_square(const T* from, int64_t from_step, T* to, int64_t to_step) {
  constexpr int n = kLanes<T>;
  Vec<T> x[n], y[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) x[i] = load(from + i * from_step);
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + n / 2]);
      y[2 * i + 1] = interleave_high(x[i], x[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) store(to + i * to_step, x[i]);
}

}  // namespace latte::LATTE_ISA
