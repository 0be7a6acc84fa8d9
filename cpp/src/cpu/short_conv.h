// SPDX-License-Identifier: Apache-2.0
// y[t] = bias + sum over j < K of w[j] x[t - left + j], per channel. Channels lie in the lanes; the
// K rows of a window come from the first-level cache, all but one of them.
//
// Backward, in one pass over x and dy: dx[t] = sum over j of w[j] dy[t + left - j],
// dw[j] = sum over t of dy[t] x[t - left + j], dbias = sum over t of dy[t].
#pragma once

#include "cpu/mixers.h"
#include "cpu/tiles.h"

namespace latte::LATTE_ISA {

using cpu::Convolution;
using cpu::ConvolutionTask;

inline constexpr int64_t kMaxWidth = 8;

// Calls f with the width as a compile-time constant.
template <class F>
LATTE_INLINE void with_width(int64_t width, F f) {
  switch (width) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    case 6:
      return f.template operator()<6>();
    case 7:
      return f.template operator()<7>();
    default:
      return f.template operator()<8>();
  }
}

// The rows of a tile and of the windows that reach out of it: row(i) is token first + i, from the
// sequence, from the K - 1 rows before it, or zero.
template <class T>
class WindowSource {
 public:
  WindowSource(Arena& arena, const Rows& rows, int64_t channels)
      : tile_(arena, rows, channels, kTileRows + kMaxWidth - 1) {}

  // `before` ends with the row before token 0; null: `zero`.
  LATTE_NOINLINE void load(int64_t first, int64_t n, int64_t tokens, const T* before,
                           int64_t before_rows, const T* zero, int64_t stride) {
    const int64_t begin = first < 0 ? 0 : first;
    const int64_t end = first + n < tokens ? first + n : tokens;
    tile_.load(begin, end > begin ? end - begin : 0);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = first + i;
      if (t >= begin && t < end) {
        rows_[i] = tile_.row(t - begin);
      } else {
        const bool reaches_back = t < 0 && before && t + before_rows >= 0;
        rows_[i] = reaches_back ? before + (t + before_rows) * stride : zero;
      }
    }
  }
  LATTE_INLINE const T* row(int64_t i) const { return rows_[i]; }
  int64_t ahead() const { return tile_.ahead(); }

 private:
  TileSource<T> tile_;
  const T* rows_[kTileRows + kMaxWidth - 1] = {};
};

template <class T>
class ShortConv {
 public:
  ShortConv(const ConvolutionTask& task, Arena arena)
      : task_(task),
        width_(round_up<T>(task.channels)),
        weight_(arena.take<T>(kMaxWidth * width_)),
        bias_(arena.take<T>(width_)),
        zero_(arena.take<T>(width_)),
        before_(arena.take<T>(kMaxWidth * width_)),
        d_final_(arena.take<T>(kMaxWidth * width_)),
        row_(arena.take<T>(width_)),
        sums_(arena.take<T>((kMaxWidth + 1) * width_)),
        totals_(arena.take<double>((kMaxWidth + 1) * width_)),
        x_(arena, task.x, task.channels),
        dy_(arena, task.dy, task.channels),
        y_(arena, task.y, task.channels),
        dx_(arena, task.dx, task.channels),
        bytes_(arena.used()) {}
  int64_t bytes() const { return bytes_; }

  void forward() {
    read_parameters();
    with_width(task_.width, [&]<int kWidth>() {
      task_.stream&& y_.can_stream() ? forward<kWidth, true>() : forward<kWidth, false>();
    });
    if (task_.is_last && task_.final.data) write_final();
  }

  void backward() {
    read_parameters();
    read_rows(task_.d_final, task_.width - 1, task_.channels, d_final_);
    for (int64_t c = 0; c < (task_.width + 1) * width_; ++c) sums_[c] = 0, totals_[c] = 0;
    with_width(task_.width, [&]<int kWidth>() {
      task_.stream&& dx_.can_stream() ? backward<kWidth, true>() : backward<kWidth, false>();
    });
    if (task_.is_first && task_.d_initial.data) write_d_initial();
    for (int64_t j = 0; j <= task_.width; ++j)
      for (int64_t c = 0; c < task_.channels; ++c) {
        const int64_t lane = c % kLanes<T>;
        double& sum = task_.partial[j * task_.partial_stride + c];
        const double total = totals_[at(task_.width + 1, j, c - lane) + lane];
        sum = task_.accumulate ? sum + total : total;
      }
  }

  void reduce() {
    const int64_t rows = task_.width + 1;
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t c = 0; c < width_; ++c) {
        double sum = 0;
        for (int64_t p = 0; p < task_.partials && c < task_.channels; ++p)
          sum += task_.partial[(p * rows + j) * task_.partial_stride + c];
        sums_[j * width_ + c] = static_cast<T>(sum);
      }
    write_rows(task_.d_weight, 0, task_.width, task_.channels, sums_, width_);
    write_row(task_.d_bias, task_.channels, sums_ + task_.width * width_);
  }

 private:
  void read_parameters() {
    read_rows(task_.weight, task_.width, task_.channels, sums_);
    for (int64_t j = 0; j < task_.width; ++j)
      for (int64_t c = 0; c < width_; c += kLanes<T>)
        store(weight_ + at(task_.width, j, c), load(sums_ + j * width_ + c));
    read_rows(task_.bias, 1, task_.channels, bias_);
    read_rows(Rows{}, 1, task_.channels, zero_);
    read_rows(task_.initial, task_.width - 1, task_.channels, before_);
  }
  // Weights and sums: vector c of row j of `rows`. The rows of a vector are neighbours: one pointer
  // for all of them, and 3 % faster than rows that are half a page apart.
  static LATTE_INLINE int64_t at(int64_t rows, int64_t j, int64_t c) {
    return c * rows + j * kLanes<T>;
  }
  int64_t right() const { return task_.width - 1 - task_.left; }

  template <int kWidth, bool kStream>
  void forward() {
    // Locals, here and below: a store of a vector may change any member, for all the compiler
    // knows.
    const T *const weight = weight_, *const bias = bias_;
    const int64_t width = width_, ahead = x_.ahead();
    for (int64_t t = task_.begin; t < task_.end; t += kTileRows) {
      const int64_t n = task_.end - t < kTileRows ? task_.end - t : kTileRows;
      x_.load(t - task_.left, n + kWidth - 1, task_.tokens, before_, kWidth - 1, zero_, width_);
      y_.begin(t);
      for (int64_t i = 0; i < n; ++i) {
        const T* x[kWidth];
        for (int j = 0; j < kWidth; ++j) x[j] = x_.row(i + j);
        T* y = y_.row(i);
        for (int64_t c = 0; c < width; c += kLanes<T>) {
          prefetch<3>(x[kWidth - 1] + c + ahead);
          Vec<T> sum = load(bias + c);
#pragma GCC unroll 8
          for (int j = 0; j < kWidth; ++j) sum += load(weight + at(kWidth, j, c)) * load(x[j] + c);
          put<T, kStream>(y + c, sum);
        }
      }
      y_.finish(n);
    }
  }

  // The last K - 1 of (initial, x). In order, since `final` may be `initial` itself.
  void write_final() {
    for (int64_t i = 0; i < task_.width - 1; ++i) {
      const int64_t t = task_.tokens - (task_.width - 1) + i;
      Rows target = task_.final;
      target.data = element(target, i);
      if (t < 0) {
        write_row(target, task_.channels, before_ + (t + task_.width - 1) * width_);
      } else {
        convert_rows(task_.x, t, 1, task_.channels, row_, 0);
        write_row(target, task_.channels, row_);
      }
    }
  }
  static void* element(const Rows& rows, int64_t i) {
    const int64_t bytes = rows.dtype == DType::float64 ? 8 : rows.dtype == DType::float32 ? 4 : 2;
    return static_cast<char*>(rows.data) + i * rows.stride_t * bytes;
  }

  // The cotangent that the final state gives to token t (zero before the last K - 1).
  const T* d_final_row(int64_t t) const {
    const int64_t i = t - task_.tokens + task_.width - 1;
    return i >= 0 ? d_final_ + i * width_ : zero_;
  }

  template <int kWidth, bool kStream>
  void backward() {
    for (int64_t t = task_.begin; t < task_.end; t += kTileRows) {
      const int64_t n = task_.end - t < kTileRows ? task_.end - t : kTileRows;
      x_.load(t - task_.left, n + kWidth - 1, task_.tokens, before_, kWidth - 1, zero_, width_);
      dy_.load(t - right(), n + kWidth - 1, task_.tokens, nullptr, 0, zero_, width_);
      dx_.begin(t);
      int64_t i = 0;
      // Two rows at a time share the loads and stores of the sums.
      for (; i + 2 <= n; i += 2) backward_rows<kWidth, 2, kStream>(t, i);
      for (; i < n; ++i) backward_rows<kWidth, 1, kStream>(t, i);
      dx_.finish(n);
      if ((t - task_.begin) % kSumRows + kTileRows >= kSumRows)
        add_to_totals(sums_, totals_, (kWidth + 1) * width_);
    }
    add_to_totals(sums_, totals_, (kWidth + 1) * width_);
  }

  template <int kWidth, int kRows, bool kStream>
  LATTE_INLINE void backward_rows(int64_t t, int64_t i) {
    const T *x[kWidth + kRows - 1], *dy[kWidth + kRows - 1], *extra[kRows];
    T* dx[kRows];
    for (int j = 0; j < kWidth + kRows - 1; ++j) x[j] = x_.row(i + j), dy[j] = dy_.row(i + j);
    for (int r = 0; r < kRows; ++r) dx[r] = dx_.row(i + r), extra[r] = d_final_row(t + i + r);
    const int64_t right = this->right();
    const T* own[kRows];
    for (int r = 0; r < kRows; ++r) own[r] = dy_.row(i + r + right);
    const T* const weight = weight_;
    T* const sums = sums_;
    const int64_t width = width_, x_ahead = x_.ahead(), dy_ahead = dy_.ahead();
    for (int64_t c = 0; c < width; c += kLanes<T>) {
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        prefetch<3>(x[kWidth - 1 + r] + c + x_ahead);
        prefetch<3>(dy[kWidth - 1 + r] + c + dy_ahead);
      }
      Vec<T> dx_sum[kRows], d[kRows];
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) dx_sum[r] = load(extra[r] + c), d[r] = load(own[r] + c);
#pragma GCC unroll 8
      for (int j = 0; j < kWidth; ++j) {
        const Vec<T> w = load(weight + at(kWidth, j, c));
        Vec<T> dw = load(sums + at(kWidth + 1, j, c));
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
          dx_sum[r] += w * load(dy[r + kWidth - 1 - j] + c);
          dw += d[r] * load(x[r + j] + c);
        }
        store(sums + at(kWidth + 1, j, c), dw);
      }
      Vec<T> d_bias = load(sums + at(kWidth + 1, kWidth, c));
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        d_bias += d[r];
        put<T, kStream>(dx[r] + c, dx_sum[r]);
      }
      store(sums + at(kWidth + 1, kWidth, c), d_bias);
    }
  }

  void write_d_initial() {
    const int64_t taps = task_.width;
    for (int64_t i = 0; i < taps - 1; ++i) {
      const int64_t t = i - (taps - 1);
      dy_.load(t - right(), taps, task_.tokens, nullptr, 0, zero_, width_);
      const T* extra = d_final_row(t);
      for (int64_t c = 0; c < width_; c += kLanes<T>) {
        Vec<T> sum = load(extra + c);
        for (int64_t j = 0; j < taps; ++j)
          sum += load(weight_ + at(taps, j, c)) * load(dy_.row(taps - 1 - j) + c);
        store(row_ + c, sum);
      }
      Rows target = task_.d_initial;
      target.data = element(target, i);
      write_row(target, task_.channels, row_);
    }
  }

  const ConvolutionTask& task_;
  int64_t width_;
  T *weight_, *bias_, *zero_, *before_, *d_final_, *row_, *sums_;
  double* totals_;
  WindowSource<T> x_, dy_;
  TileSink<T> y_, dx_;
  int64_t bytes_;
};

template <class T>
void run_convolution(Convolution kernel, const ConvolutionTask& task, void* memory) {
  ShortConv<T> conv(task, Arena(memory));
  switch (kernel) {
    case Convolution::forward:
      return conv.forward();
    case Convolution::backward:
      return conv.backward();
    case Convolution::reduce:
      return conv.reduce();
  }
}

template <class T>
int64_t convolution_bytes(int64_t channels) {
  ConvolutionTask task;
  task.channels = channels;
  return ShortConv<T>(task, Arena(nullptr)).bytes();
}

}  // namespace latte::LATTE_ISA
