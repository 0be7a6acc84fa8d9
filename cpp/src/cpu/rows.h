// SPDX-License-Identifier: Apache-2.0
// Rows of the caller's tensors, read and written in the compute type, whatever their dtype,
// strides, mask and grouping. Widths are padded to whole vectors here and nowhere else.
//
// Grouped heads (g query heads on one key/value head) need no kernel of their own in a sequential
// scan: token t becomes g virtual tokens, the first with its key and value, the others with an
// absent key (the identity of the merge). Row i is then token i / g, query head i % g. Exact, and
// no sum over heads is left to do afterwards.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace latte::LATTE_ISA {

using cpu::Rows;

enum class PerRow : bool {
  every,  // q, y, dy, dq: one row per query head
  first,  // k, v, dk, dv: one row per token, absent for the other query heads
};

template <class F>
LATTE_INLINE void with_storage_type(double, DType, F f) {
  f(static_cast<double*>(nullptr));
}
template <class F>
LATTE_INLINE void with_storage_type(float, DType dtype, F f) {
  if (dtype == DType::bfloat16) {
    f(static_cast<bfloat16*>(nullptr));
  } else if (dtype == DType::float16) {
    f(static_cast<float16*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

template <class T>
inline constexpr DType kComputeDType = sizeof(T) == 8 ? DType::float64 : DType::float32;

template <class T>
LATTE_INLINE int64_t round_up(int64_t width) {
  return (width + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// A row stride with an odd number of 64-byte lines: a column of rows then visits every L1 set.
template <class T>
LATTE_INLINE int64_t padded_stride(int64_t width) {
  constexpr int64_t line = 64 / sizeof(T);
  return ((width + line - 1) / line | 1) * line;
}

template <class T>
class RowView {
 public:
  RowView(const Rows& rows, PerRow per_row, int64_t width, int64_t group)
      : rows_(rows), width_(width), group_(group), per_row_(per_row) {}

  // May the scan touch the caller's memory in place: whole vectors, the compute type, no gaps?
  bool in_place() const { return rows_.dtype == kComputeDType<T> && whole_vectors(); }
  T* row_in_place(int64_t i) const { return static_cast<T*>(rows_.data) + i * rows_.stride_t; }
  int64_t stride_in_place() const { return rows_.stride_t; }

  // For prefetching: is a row one piece of memory, in whatever dtype, a fixed step from the next?
  bool one_piece() const { return rows_.data && rows_.stride_c == 1 && group_ == 1; }
  const char* row_address(int64_t i) const {
    return static_cast<const char*>(rows_.data) + i * stride_bytes();
  }
  int64_t row_bytes() const { return width_ * storage_bytes(); }
  int64_t stride_bytes() const { return rows_.stride_t * storage_bytes(); }

 protected:
  // Every row is there, without gaps: what a loop then need not ask of each row was a twentieth of
  // a pass in half precision.
  bool every_row() const { return rows_.stride_c == 1 && group_ == 1; }
  bool whole_vectors() const { return every_row() && width_ % kLanes<T> == 0; }
  int64_t storage_bytes() const {
    return rows_.dtype == DType::bfloat16 || rows_.dtype == DType::float16 ? 2 : sizeof(T);
  }
  bool has_row(int64_t i) const { return per_row_ == PerRow::every || i % group_ == 0; }
  int64_t offset(int64_t i) const {
    return group_ == 1 ? i * rows_.stride_t
                       : i / group_ * rows_.stride_t + i % group_ * rows_.stride_g;
  }

  Rows rows_;
  int64_t width_, group_;
  PerRow per_row_;
};

// Rows of whole vectors as they are stored.
template <class T, class S>
struct Vectors {
  const S* data;
  int64_t stride;
  T scale;

  LATTE_INLINE Vec<T> operator()(int64_t i, int64_t c) const {
    return load_compute(data + i * stride + c) * scale;
  }
};

// The same of rows that end in part of a vector, which `absent` fills.
template <class T, class S>
struct VectorsAndTail {
  const S* data;
  int64_t stride;
  T scale;
  int64_t width;
  T absent;

  LATTE_INLINE Vec<T> operator()(int64_t i, int64_t c) const {
    const S* p = data + i * stride + c;
    if (c + kLanes<T> <= width) return load_compute(p) * scale;
    return first_lanes(width - c, load_compute_part(p, width - c) * scale, absent);
  }
};

template <class T>
class Source : public RowView<T> {
 public:
  Source(const Rows& rows, PerRow per_row, int64_t width, int64_t group, T absent, T scale = 1,
         const bool* mask = nullptr, int64_t mask_stride = 0)
      : RowView<T>(rows, per_row, width, group),
        mask_(mask),
        mask_stride_(mask_stride),
        absent_(absent),
        scale_(scale) {}

  bool in_place() const { return RowView<T>::in_place() && !mask_ && scale_ == 1; }
  // May whole vectors be read at rows that end in part of one? `behind` rows that follow are memory
  // of the tensor too.
  bool vectors_in_place(int64_t behind) const {
    const int64_t stride = this->rows_.stride_t, width = this->width_;
    return this->rows_.dtype == kComputeDType<T> && every_row() && scale_ == 1 && stride >= 0 &&
           behind * stride + width >= round_up<T>(width);
  }

  // Calls consume(i, c, vector) for n rows from `first`, c stepping over whole vectors; i counts
  // from 0. Lanes past the width and absent rows hold `absent`.
  template <class F>
  LATTE_INLINE void for_each_vector(int64_t first, int64_t n, F consume) const {
    if (in_place()) {
      for (int64_t i = 0; i < n; ++i) {
        const T* row = this->row_in_place(first + i);
        for (int64_t c = 0; c < this->width_; c += kLanes<T>) consume(i, c, load(row + c));
      }
      return;
    }
    with_storage_type(T(), this->rows_.dtype, [&](auto* storage) {
      if (whole_vectors()) {
        consume_vectors(converted(storage, first), n, this->width_, consume);
      } else if (every_row()) {
        consume_vectors(converted_tail(storage, first), n, this->width_, consume);
      } else {
        for (int64_t i = 0; i < n; ++i) convert_row(storage, first + i, i, consume);
      }
    });
  }

  // Calls read(rows) once, where rows(i, c) is a vector of row first + i: of the caller's memory,
  // converted on the way, or of a copy in `scratch` where rows have gaps or are masked.
  template <class F>
  LATTE_INLINE void with_vectors(int64_t first, int64_t n, T* scratch, int64_t scratch_stride,
                                 F read) const {
    if (!every_row()) {
      copy(first, n, scratch, scratch_stride);
      return read(Vectors<T, T>{scratch, scratch_stride, 1});
    }
    with_storage_type(T(), this->rows_.dtype, [&](auto* storage) {
      whole_vectors() ? read(converted(storage, first)) : read(converted_tail(storage, first));
    });
  }

  // The same into rows of `stride` elements.
  LATTE_INLINE void copy(int64_t first, int64_t n, T* rows, int64_t stride) const {
    for_each_vector(first, n,
                    [=](int64_t i, int64_t c, Vec<T> x) { store(rows + i * stride + c, x); });
  }

 private:
  bool every_row() const { return RowView<T>::every_row() && !mask_; }
  bool whole_vectors() const { return RowView<T>::whole_vectors() && !mask_; }
  template <class S>
  LATTE_INLINE VectorsAndTail<T, S> converted_tail(const S* storage, int64_t first) const {
    const Vectors<T, S> rows = converted(storage, first);
    return {rows.data, rows.stride, rows.scale, this->width_, absent_};
  }
  template <class S>
  LATTE_INLINE Vectors<T, S> converted(const S*, int64_t first) const {
    return {static_cast<const S*>(this->rows_.data) + first * this->rows_.stride_t,
            this->rows_.stride_t, scale_};
  }
  // By value, here and in write_vectors(): a store of a vector may change any member and any
  // captured reference, for all the compiler knows, which then reads them again for every vector.
  template <class R, class F>
  LATTE_INLINE static void consume_vectors(R rows, int64_t n, int64_t width, F consume) {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < width; c += kLanes<T>) consume(i, c, rows(i, c));
  }
  template <class S, class F>
  LATTE_INLINE void convert_row(const S*, int64_t row_index, int64_t i, F consume) const {
    const bool present =
        this->has_row(row_index) && (!mask_ || mask_[row_index / this->group_ * mask_stride_]);
    const S* row = static_cast<const S*>(this->rows_.data) + this->offset(row_index);
    const int64_t stride_c = this->rows_.stride_c, width = this->width_;
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      Vec<T> x = splat(absent_);
      if (present && stride_c == 1 && c + kLanes<T> <= width) {
        x = load_compute(row + c) * scale_;
      } else if (present && stride_c == 1) {
        x = first_lanes(width - c, load_compute_part(row + c, width - c) * scale_, absent_);
      } else if (present) {
        for (int64_t lane = 0; lane < kLanes<T> && c + lane < width; ++lane)
          x[lane] = to_compute(row[(c + lane) * stride_c]) * scale_;
      }
      consume(i, c, x);
    }
  }

  const bool* mask_;
  int64_t mask_stride_;
  T absent_, scale_;
};

template <class T>
class Sink : public RowView<T> {
 public:
  using RowView<T>::RowView;

  // Writes the n rows that produce(i, c) gives, i from 0; lanes past the width and rows that the
  // tensor does not have are dropped.
  template <class F>
  LATTE_INLINE void write(int64_t first, int64_t n, F produce) const {
    with_storage_type(T(), this->rows_.dtype, [&](auto* storage) {
      if (this->every_row()) {
        write_vectors(
            static_cast<decltype(storage)>(this->rows_.data) + first * this->rows_.stride_t,
            this->rows_.stride_t, n, this->width_, produce);
      } else {
        for (int64_t i = 0; i < n; ++i)
          if (this->has_row(first + i)) write_row(storage, first + i, i, produce);
      }
    });
  }

 private:
  template <class S, class F>
  LATTE_INLINE static void write_vectors(S* rows, int64_t stride, int64_t n, int64_t width,
                                         F produce) {
    const int64_t whole = width - width % kLanes<T>;
    for (int64_t i = 0; i < n; ++i, rows += stride) {
      for (int64_t c = 0; c < whole; c += kLanes<T>) store_compute(rows + c, produce(i, c));
      if (whole < width) store_compute_part(rows + whole, width - whole, produce(i, whole));
    }
  }
  template <class S, class F>
  LATTE_INLINE void write_row(S*, int64_t row_index, int64_t i, F produce) const {
    S* row = static_cast<S*>(this->rows_.data) + this->offset(row_index);
    const int64_t stride_c = this->rows_.stride_c, width = this->width_;
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      const Vec<T> x = produce(i, c);
      if (stride_c == 1 && c + kLanes<T> <= width) {
        store_compute(row + c, x);
      } else if (stride_c == 1) {
        store_compute_part(row + c, width - c, x);
      } else {
        for (int64_t lane = 0; lane < kLanes<T> && c + lane < width; ++lane)
          from_compute(x[lane], row + (c + lane) * stride_c);
      }
    }
  }
};

}  // namespace latte::LATTE_ISA
