// SPDX-License-Identifier: Apache-2.0
// Tiles of a few rows in the compute type: the caller's memory itself where it is that already, a
// converted copy, which stays in the first- or second-level cache, where it is not. Kernels above
// see whole vectors only.
#pragma once

#include "cpu/arena.h"
#include "cpu/heuristics.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace latte::LATTE_ISA {

using cpu::kTileRows;

// Rows [first, first + n) as rows of `stride` elements, zero in the lanes past the last channel.
template <class T>
LATTE_NOINLINE void convert_rows(const Rows& rows, int64_t first, int64_t n, int64_t channels,
                                 T* out, int64_t stride) {
  if (rows.stride_c != 1) {
    Source<T>(rows, PerRow::every, channels, 1, T(0)).copy(first, n, out, stride);
    return;
  }
  with_storage_type(T(), rows.dtype, [&](auto* storage) {
    // Locals, since a store of a vector may change any member, for all the compiler knows.
    const auto* row = static_cast<decltype(storage)>(rows.data) + first * rows.stride_t;
    const int64_t step = rows.stride_t, whole = channels - channels % kLanes<T>;
    const int64_t ahead = step * kTileRows;
    for (int64_t i = 0; i < n; ++i, row += step, out += stride) {
      for (int64_t c = 0; c < whole; c += kLanes<T>) {
        prefetch<3>(row + c + ahead);
        store(out + c, load_compute(row + c));
      }
      if (whole == channels) continue;
      store(out + whole, splat(T(0)));
      for (int64_t c = whole; c < channels; ++c) out[c] = to_compute(row[c]);
    }
  });
}
template <class T>
LATTE_NOINLINE void write_rows(const Rows& rows, int64_t first, int64_t n, int64_t channels,
                               const T* from, int64_t stride) {
  if (rows.stride_c != 1) {
    Sink<T>(rows, PerRow::every, channels, 1).write(first, n, [&](int64_t i, int64_t c) {
      return load(from + i * stride + c);
    });
    return;
  }
  with_storage_type(T(), rows.dtype, [&](auto* storage) {
    auto* row = static_cast<decltype(storage)>(rows.data) + first * rows.stride_t;
    const int64_t step = rows.stride_t, whole = channels - channels % kLanes<T>;
    for (int64_t i = 0; i < n; ++i, row += step, from += stride) {
      for (int64_t c = 0; c < whole; c += kLanes<T>) store_compute(row + c, load(from + c));
      for (int64_t c = whole; c < channels; ++c) from_compute(from[c], row + c);
    }
  });
}

// The same for rows that may be absent.
template <class T>
void read_rows(const Rows& rows, int64_t n, int64_t channels, T* out) {
  const int64_t stride = round_up<T>(channels);
  if (rows.data) return convert_rows(rows, 0, n, channels, out, stride);
  for (int64_t c = 0; c < n * stride; ++c) out[c] = 0;
}
template <class T>
void write_row(const Rows& rows, int64_t channels, const T* from) {
  if (rows.data) write_rows(rows, 0, 1, channels, from, 0);
}

template <class T>
class TileSource {
 public:
  TileSource(Arena& arena, const Rows& rows, int64_t channels, int64_t tile_rows = kTileRows)
      : rows_(rows),
        channels_(channels),
        stride_(padded_stride<T>(channels)),
        buffer_(arena.take<T>(tile_rows * stride_)),
        in_place_(rows.dtype == kComputeDType<T> && rows.stride_c == 1 &&
                  channels % kLanes<T> == 0) {
    const int64_t bytes = channels * static_cast<int64_t>(sizeof(T));
    if (in_place_) ahead_ = rows.stride_t * (1 + cpu::kFetchBytes / bytes);
  }

  // Makes n rows from `first` readable as row(0), row(1), ..
  LATTE_INLINE void load(int64_t first, int64_t n) {
    if (in_place_) {
      base_ = static_cast<const T*>(rows_.data) + first * rows_.stride_t;
      step_ = rows_.stride_t;
    } else {
      if (n > 0) convert_rows(rows_, first, n, channels_, buffer_, stride_);
      base_ = buffer_;
      step_ = stride_;
    }
  }
  LATTE_INLINE const T* row(int64_t i) const { return base_ + i * step_; }
  // From an element to what the scan reads some rows later, for prefetching: the hardware expects
  // rows in rising order (without: 1.4 to 1.6 times as long backward).
  int64_t ahead() const { return ahead_; }

 private:
  Rows rows_;
  int64_t channels_, stride_;
  T* buffer_;
  bool in_place_;
  const T* base_ = nullptr;
  int64_t step_ = 0, ahead_ = 0;
};

template <class T>
class TileSink {
 public:
  TileSink(Arena& arena, const Rows& rows, int64_t channels)
      : rows_(rows),
        channels_(channels),
        stride_(padded_stride<T>(channels)),
        buffer_(arena.take<T>(kTileRows * stride_)),
        in_place_(rows.dtype == kComputeDType<T> && rows.stride_c == 1 &&
                  channels % kLanes<T> == 0) {}

  bool can_stream() const {
    constexpr int64_t bytes = sizeof(T);
    return in_place_ && reinterpret_cast<uintptr_t>(rows_.data) % LATTE_VECTOR_BYTES == 0 &&
           rows_.stride_t * bytes % LATTE_VECTOR_BYTES == 0;
  }

  LATTE_INLINE void begin(int64_t first) {
    first_ = first;
    base_ = in_place_ ? static_cast<T*>(rows_.data) + first * rows_.stride_t : buffer_;
    step_ = in_place_ ? rows_.stride_t : stride_;
  }
  LATTE_INLINE T* row(int64_t i) const { return base_ + i * step_; }
  LATTE_INLINE void finish(int64_t n) const {
    if (!in_place_) write_rows(rows_, first_, n, channels_, buffer_, stride_);
  }

 private:
  Rows rows_;
  int64_t channels_, stride_, first_ = 0;
  T* buffer_;
  bool in_place_;
  T* base_ = nullptr;
  int64_t step_ = 0;
};

template <class T, bool kStream>
LATTE_INLINE void put(T* p, Vec<T> x) {
  if constexpr (kStream) {
    stream(p, x);
  } else {
    store(p, x);
  }
}

// Adds the sums of a chunk of rows to the totals, in double: a float32 sum over 10^5 rows would err
// by 1e-5 of its size.
template <class T>
void add_to_totals(T* sums, double* totals, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    totals[c] += static_cast<double>(sums[c]);
    sums[c] = 0;
  }
}
// Rows between two of those.
inline constexpr int64_t kSumRows = 64;

}  // namespace latte::LATTE_ISA
