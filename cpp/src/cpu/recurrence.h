// SPDX-License-Identifier: Apache-2.0
// h[t] = a[t] h[t-1] + b[t], with a and b given or from the gates of RG-LRU. Channels lie in the
// lanes, time in the loop; the carry of a block of channels stays in the first-level cache, so that
// every row is read once and in order.
//
// Backward, from the last token: g[t] = dh[t] + c[t], c[t-1] = a[t] g[t], which is a recurrence of
// the same form. db = g, da = g h[t-1].
#pragma once

#include "cpu/mixers.h"
#include "cpu/tiles.h"

namespace latte::LATTE_ISA {

using cpu::Recurrence;
using cpu::RecurrenceTask;

// log a = -kPower r softplus(log_lambda), kept in powers of two: log2(a) = -r decay.
template <class T>
inline constexpr T kPower = 8;
// Half of 1 / 1000: the derivative of a square root s is 1 / (2 s), bounded by 1000.
template <class T>
inline constexpr T kSteepest = T(5e-4);

// What a segment does to the carry that enters it: it leaves as product * carry + end.
template <class T>
class Summary {
 public:
  Summary(Arena& arena, int64_t channels)
      : width_(round_up<T>(channels)),
        product_(arena.take<T>(width_)),
        end_(arena.take<T>(width_)) {}

  void reset() const {
    for (int64_t c = 0; c < width_; c += kLanes<T>) {
      store(product_ + c, splat(T(1)));
      store(end_ + c, splat(T(0)));
    }
  }
  // Appends carry -> a * carry + b.
  LATTE_INLINE void append(int64_t c, Vec<T> a, Vec<T> b) const {
    store(product_ + c, a * load(product_ + c));
    store(end_ + c, a * load(end_ + c) + b);
  }
  void write(void* slot) const {
    T* out = static_cast<T*>(slot);
    const int64_t row = cpu::padded_channels(width_);
    for (int64_t c = 0; c < width_; c += kLanes<T>) {
      store(out + c, load(product_ + c));
      store(out + row + c, load(end_ + c));
    }
  }

 private:
  int64_t width_;
  T *product_, *end_;
};

// carry = what `from` and the summaries between give.
template <class T>
void enter(const RecurrenceTask& task, const Rows& from, T* carry) {
  read_rows(from, 1, task.channels, carry);
  const int64_t width = round_up<T>(task.channels), row = cpu::padded_channels(task.channels);
  const T* summary = static_cast<const T*>(task.summaries);
  for (int64_t s = 0; s < task.summary_count; ++s, summary += 2 * row)
    for (int64_t c = 0; c < width; c += kLanes<T>)
      store(carry + c, load(summary + c) * load(carry + c) + load(summary + row + c));
}

template <class T, class F>
LATTE_INLINE void for_each_tile(int64_t tokens, F f) {
  for (int64_t t = 0; t < tokens; t += kTileRows)
    f(t, tokens - t < kTileRows ? tokens - t : kTileRows);
}

template <class T>
class Linear {
 public:
  Linear(const RecurrenceTask& task, Arena arena)
      : task_(task),
        width_(round_up<T>(task.channels)),
        carry_(arena.take<T>(width_)),
        before_(arena.take<T>(width_)),
        a_(arena, task.a, task.channels),
        b_(arena, task.b, task.channels),
        h_(arena, task.h, task.channels),
        dh_(arena, task.dh, task.channels),
        h_out_(arena, task.h, task.channels),
        da_(arena, task.da, task.channels),
        db_(arena, task.db, task.channels),
        summary_(arena, task.channels),
        bytes_(arena.used()) {}
  int64_t bytes() const { return bytes_; }

  void forward() { task_.stream&& h_out_.can_stream() ? forward<true>() : forward<false>(); }
  void backward() {
    task_.stream&& da_.can_stream() && db_.can_stream() ? backward<true>() : backward<false>();
  }

  void summarise_forward() {
    summary_.reset();
    for_each_tile<T>(task_.tokens, [&](int64_t t, int64_t n) {
      a_.load(t, n), b_.load(t, n);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < width_; c += kLanes<T>)
          summary_.append(c, load(a_.row(i) + c), load(b_.row(i) + c));
    });
    summary_.write(task_.summary);
  }

  void summarise_backward() {
    summary_.reset();
    for_each_tile<T>(task_.tokens, [&](int64_t t, int64_t n) {
      a_.load(t, n), dh_.load(t, n);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = 0; c < width_; c += kLanes<T>) {
          const Vec<T> a = load(a_.row(i) + c);
          summary_.append(c, a, a * load(dh_.row(i) + c));
        }
    });
    summary_.write(task_.summary);
  }

 private:
  template <bool kStream>
  void forward() {
    enter(task_, task_.initial, carry_);
    // Locals, here and below: a store of a vector may change any member, for all the compiler
    // knows.
    T* const carry = carry_;
    const int64_t width = width_;
    for_each_tile<T>(task_.tokens, [&](int64_t t, int64_t n) {
      a_.load(t, n), b_.load(t, n), h_out_.begin(t);
      for (int64_t i = 0; i < n; ++i) {
        const T *a = a_.row(i), *b = b_.row(i);
        T* out = h_out_.row(i);
        for (int64_t c = 0; c < width; c += kLanes<T>) {
          const Vec<T> h = load(a + c) * load(carry + c) + load(b + c);
          store(carry + c, h);
          put<T, kStream>(out + c, h);
        }
      }
      h_out_.finish(n);
    });
    write_row(task_.final, task_.channels, carry_);
  }

  template <bool kStream>
  void backward() {
    enter(task_, task_.d_final, carry_);
    read_rows(task_.initial, 1, task_.channels, before_);
    T* const carry = carry_;
    const int64_t width = width_;
    const int64_t a_ahead = a_.ahead(), h_ahead = h_.ahead(), dh_ahead = dh_.ahead();
    for_each_tile<T>(task_.tokens, [&](int64_t t, int64_t n) {
      const bool last = t + n == task_.tokens;
      a_.load(t, n), dh_.load(t, n), h_.load(t + 1, last ? n - 1 : n);
      da_.begin(t), db_.begin(t);
      for (int64_t i = 0; i < n; ++i) {
        const T *a = a_.row(i), *dh = dh_.row(i);
        const T* before = last && i == n - 1 ? before_ : h_.row(i);
        T *da = da_.row(i), *db = db_.row(i);
        for (int64_t c = 0; c < width; c += kLanes<T>) {
          prefetch<3>(a + c + a_ahead), prefetch<3>(before + c + h_ahead);
          prefetch<3>(dh + c + dh_ahead);
          const Vec<T> g = load(dh + c) + load(carry + c);
          store(carry + c, load(a + c) * g);
          put<T, kStream>(db + c, g);
          put<T, kStream>(da + c, g * load(before + c));
        }
      }
      da_.finish(n), db_.finish(n);
    });
    write_row(task_.d_initial, task_.channels, carry_);
  }

  const RecurrenceTask& task_;
  int64_t width_;
  T *carry_, *before_;
  TileSource<T> a_, b_, h_, dh_;
  TileSink<T> h_out_, da_, db_;
  Summary<T> summary_;
  int64_t bytes_;
};

// r, 1 - r, i, 1 - i, a and sqrt(1 - a^2) of one vector.
template <class T>
struct Gates {
  LATTE_INLINE Gates(Vec<T> gate_a, Vec<T> gate_x, Vec<T> decay)
      : r(sigmoid<T>(gate_a, r_rest)), i(sigmoid<T>(gate_x, i_rest)) {
    // (1 - a) (1 + a), where 1 - a^2 would lose all digits of a slow decay.
    const Vec<T> lost = -exp2m1(-r * decay, a);
    root = sqrt(lost * (1 + a));
  }
  Vec<T> r_rest, i_rest, r, i, a, root;
};

template <class T>
class Gated {
 public:
  Gated(const RecurrenceTask& task, Arena arena)
      : task_(task),
        width_(round_up<T>(task.channels)),
        carry_(arena.take<T>(width_)),
        before_(arena.take<T>(width_)),
        decay_(arena.take<T>(width_)),
        sums_(arena.take<T>(width_)),
        totals_(arena.take<double>(width_)),
        x_(arena, task.b, task.channels),
        gate_a_(arena, task.gate_a, task.channels),
        gate_x_(arena, task.gate_x, task.channels),
        h_(arena, task.h, task.channels),
        dh_(arena, task.dh, task.channels),
        h_out_(arena, task.h, task.channels),
        dx_(arena, task.db, task.channels),
        d_gate_a_(arena, task.d_gate_a, task.channels),
        d_gate_x_(arena, task.d_gate_x, task.channels),
        summary_(arena, task.channels),
        bytes_(arena.used()) {}
  int64_t bytes() const { return bytes_; }

  void forward() { task_.stream&& h_out_.can_stream() ? forward<true>() : forward<false>(); }
  void backward() {
    task_.stream&& dx_.can_stream() && d_gate_a_.can_stream() && d_gate_x_.can_stream()
        ? backward<true>()
        : backward<false>();
  }

  void summarise_forward() {
    read_decay();
    summary_.reset();
    for_each_tile<T>(task_.tokens, [&](int64_t t, int64_t n) {
      x_.load(t, n), gate_a_.load(t, n), gate_x_.load(t, n);
      for (int64_t i = 0; i < n; ++i) {
        if (absent(t + i)) continue;
        const bool first = t + i == task_.first;
        for (int64_t c = 0; c < width_; c += kLanes<T>) {
          const Gates<T> g = gates(i, c);
          const Vec<T> root = first ? splat(T(1)) : g.root;
          summary_.append(c, g.a, root * (g.i * load(x_.row(i) + c)));
        }
      }
    });
    summary_.write(task_.summary);
  }

  void summarise_backward() {
    read_decay();
    summary_.reset();
    for_each_tile<T>(task_.tokens, [&](int64_t t, int64_t n) {
      gate_a_.load(t, n), dh_.load(t, n);
      for (int64_t i = 0; i < n; ++i) {
        const bool skipped = absent(t + i);
        for (int64_t c = 0; c < width_; c += kLanes<T>) {
          Vec<T> a = splat(T(1)), rest;
          if (!skipped) exp2m1(-sigmoid<T>(load(gate_a_.row(i) + c), rest) * load(decay_ + c), a);
          summary_.append(c, a, a * load(dh_.row(i) + c));
        }
      }
    });
    summary_.write(task_.summary);
  }

  // d_log_lambda from d of kPower softplus(log_lambda).
  void reduce() {
    convert_rows(task_.log_lambda, 0, 1, task_.channels, decay_, 0);
    for (int64_t c = 0; c < task_.channels; ++c) {
      double sum = 0;
      for (int64_t p = 0; p < task_.partials; ++p)
        sum += task_.partial[p * task_.partial_stride + c];
      const double slope = kPower<double> / (1 + __builtin_exp(-static_cast<double>(decay_[c])));
      sums_[c] = static_cast<T>(sum * slope);
    }
    for (int64_t c = task_.channels; c < width_; ++c) sums_[c] = 0;
    write_row(task_.d_log_lambda, task_.channels, sums_);
  }

 private:
  bool absent(int64_t t) const { return task_.mask && !task_.mask[t * task_.mask_stride]; }

  LATTE_INLINE Gates<T> gates(int64_t i, int64_t c) const {
    return {load(gate_a_.row(i) + c), load(gate_x_.row(i) + c), load(decay_ + c)};
  }

  // kPower softplus(log_lambda) / log(2).
  void read_decay() {
    convert_rows(task_.log_lambda, 0, 1, task_.channels, decay_, 0);
    for (int64_t c = 0; c < width_; ++c) {
      const double x = static_cast<double>(decay_[c]);
      const double tail = __builtin_log1p(__builtin_exp(x > 0 ? -x : x));
      decay_[c] = static_cast<T>(kPower<double> / kLog2<double> * (x > 0 ? x + tail : tail));
    }
  }

  template <bool kStream>
  void forward() {
    read_decay();
    enter(task_, task_.initial, carry_);
    T *const carry = carry_, *const decay = decay_;
    const int64_t width = width_;
    for_each_tile<T>(task_.tokens, [&](int64_t t, int64_t n) {
      x_.load(t, n), gate_a_.load(t, n), gate_x_.load(t, n), h_out_.begin(t);
      for (int64_t i = 0; i < n; ++i) {
        const T* x = x_.row(i);
        T* out = h_out_.row(i);
        if (absent(t + i)) {
          for (int64_t c = 0; c < width; c += kLanes<T>) put<T, kStream>(out + c, load(carry + c));
          continue;
        }
        const bool first = t + i == task_.first;
        const T *gate_a = gate_a_.row(i), *gate_x = gate_x_.row(i);
        for (int64_t c = 0; c < width; c += kLanes<T>) {
          const Gates<T> g(load(gate_a + c), load(gate_x + c), load(decay + c));
          const Vec<T> root = first ? splat(T(1)) : g.root;
          const Vec<T> h = g.a * load(carry + c) + root * (g.i * load(x + c));
          store(carry + c, h);
          put<T, kStream>(out + c, h);
        }
      }
      h_out_.finish(n);
    });
    write_row(task_.final, task_.channels, carry_);
  }

  template <bool kStream>
  void backward() {
    read_decay();
    enter(task_, task_.d_final, carry_);
    read_rows(task_.initial, 1, task_.channels, before_);
    for (int64_t c = 0; c < width_; ++c) sums_[c] = 0, totals_[c] = 0;
    for_each_tile<T>(task_.tokens, [&](int64_t t, int64_t n) {
      const bool last = t + n == task_.tokens;
      x_.load(t, n), gate_a_.load(t, n), gate_x_.load(t, n), dh_.load(t, n);
      h_.load(t + 1, last ? n - 1 : n);
      dx_.begin(t), d_gate_a_.begin(t), d_gate_x_.begin(t);
      for (int64_t i = 0; i < n; ++i) {
        const T* before = last && i == n - 1 ? before_ : h_.row(i);
        if (absent(t + i)) {
          skip_row<kStream>(i);
        } else {
          t + i == task_.first ? backward_row<kStream, true>(i, before)
                               : backward_row<kStream, false>(i, before);
        }
      }
      dx_.finish(n), d_gate_a_.finish(n), d_gate_x_.finish(n);
      if (t % kSumRows + kTileRows >= kSumRows) add_to_totals(sums_, totals_, width_);
    });
    add_to_totals(sums_, totals_, width_);
    write_row(task_.d_initial, task_.channels, carry_);
    for (int64_t c = 0; c < task_.channels; ++c)
      task_.partial[c] = task_.accumulate ? task_.partial[c] + totals_[c] : totals_[c];
  }

  template <bool kStream>
  LATTE_INLINE void skip_row(int64_t i) {
    const T* dh = dh_.row(i);
    for (int64_t c = 0; c < width_; c += kLanes<T>) {
      store(carry_ + c, load(dh + c) + load(carry_ + c));
      put<T, kStream>(dx_.row(i) + c, splat(T(0)));
      put<T, kStream>(d_gate_a_.row(i) + c, splat(T(0)));
      put<T, kStream>(d_gate_x_.row(i) + c, splat(T(0)));
    }
  }

  template <bool kStream, bool kFirst>
  LATTE_INLINE void backward_row(int64_t i, const T* before) {
    const T *x = x_.row(i), *dh = dh_.row(i), *gate_a = gate_a_.row(i), *gate_x = gate_x_.row(i);
    T *dx = dx_.row(i), *d_gate_a = d_gate_a_.row(i), *d_gate_x = d_gate_x_.row(i);
    T *const carry = carry_, *const decay = decay_, *const sums = sums_;
    const int64_t x_ahead = x_.ahead(), dh_ahead = dh_.ahead(), h_ahead = h_.ahead();
    const int64_t a_ahead = gate_a_.ahead(), i_ahead = gate_x_.ahead(), width = width_;
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      prefetch<3>(x + c + x_ahead), prefetch<3>(dh + c + dh_ahead);
      prefetch<3>(before + c + h_ahead);
      prefetch<3>(gate_a + c + a_ahead), prefetch<3>(gate_x + c + i_ahead);
      const Gates<T> g(load(gate_a + c), load(gate_x + c), load(decay + c));
      const Vec<T> d = load(dh + c) + load(carry + c), d_through = d * g.a;
      store(carry + c, d_through);
      const Vec<T> gated = g.i * load(x + c), d_input = kFirst ? d : d * g.root;
      put<T, kStream>(dx + c, d_input * g.i);
      put<T, kStream>(d_gate_x + c, d_input * gated * g.i_rest);
      Vec<T> d_log_a = d_through * load(before + c);
      if constexpr (!kFirst)
        d_log_a -= d_through * (gated * g.a) * reciprocal(max(splat(kSteepest<T>), g.root));
      const Vec<T> d_r = -d_log_a * g.r;
      store(sums + c, load(sums + c) + d_r);
      put<T, kStream>(d_gate_a + c, d_r * (kLog2<T> * load(decay + c)) * g.r_rest);
    }
  }

  const RecurrenceTask& task_;
  int64_t width_;
  T *carry_, *before_, *decay_, *sums_;
  double* totals_;
  TileSource<T> x_, gate_a_, gate_x_, h_, dh_;
  TileSink<T> h_out_, dx_, d_gate_a_, d_gate_x_;
  Summary<T> summary_;
  int64_t bytes_;
};

template <class T>
void run_recurrence(Recurrence kernel, const RecurrenceTask& task, void* memory) {
  const Arena arena(memory);
  switch (kernel) {
    case Recurrence::linear_forward:
      return Linear<T>(task, arena).forward();
    case Recurrence::linear_summary:
      return Linear<T>(task, arena).summarise_forward();
    case Recurrence::linear_backward:
      return Linear<T>(task, arena).backward();
    case Recurrence::linear_backward_summary:
      return Linear<T>(task, arena).summarise_backward();
    case Recurrence::gated_forward:
      return Gated<T>(task, arena).forward();
    case Recurrence::gated_summary:
      return Gated<T>(task, arena).summarise_forward();
    case Recurrence::gated_backward:
      return Gated<T>(task, arena).backward();
    case Recurrence::gated_backward_summary:
      return Gated<T>(task, arena).summarise_backward();
    case Recurrence::gated_reduce:
      return Gated<T>(task, arena).reduce();
  }
}

template <class T>
int64_t recurrence_bytes(Recurrence kernel, int64_t channels) {
  RecurrenceTask task;
  task.channels = channels;
  return kernel < Recurrence::gated_forward ? Linear<T>(task, Arena(nullptr)).bytes()
                                            : Gated<T>(task, Arena(nullptr)).bytes();
}

}  // namespace latte::LATTE_ISA
