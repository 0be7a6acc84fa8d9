// SPDX-License-Identifier: Apache-2.0
// From logits to the operands of the scan. Per latent, with a reference r that never falls,
//
//   e_t = exp(k_t - r)    z_t = z_(t-1) + e_t    w_t = p(l|t) / z_t    p(l|t) = softmax(q_t)_l
//
// and y_t = sum_l w_tl S_tl does not depend on r. The reference is raised lazily: only when a key
// exceeds r + 16. So r was some earlier key, z >= 1 and e <= e^16 hold always, nothing is divided
// by a small number, and no chunk can underflow. A chunk whose largest key exceeds r + 16, but not
// r + 60, is raised as a whole, to the largest keys, before its first token: z is at least exp(-60)
// in it. A chunk that climbs higher is cut into runs of tokens of which the same holds, and the
// scan decays the state by alpha = exp(r before the run - r) as it comes to each: half as many
// instructions again as a token has, at every other token for keys that rise by 50 per token. A
// raised chunk is not scanned as one run, since scaling its state once, outside of the scan's loop,
// costs less: 1.05 instead of 1.08 to 1.14 times the time of random keys.
#pragma once

#include <cfloat>

#include "cpu/scan.h"

namespace latte::LATTE_ISA {

template <class T>
inline constexpr T kLazyMargin = 16;
// exp(-60) = 9e-27: normal, above kEmptyNorm, and a key that underflows has less than 1e-11 of it.
template <class T>
inline constexpr T kHighestRaise = 60;
// Finite, so that -inf - r is -inf and never NaN.
template <class T>
inline constexpr T kLowest = sizeof(T) == 8 ? T(-DBL_MAX) : T(-FLT_MAX);
// Below every normaliser (z >= 1) but that of an empty state, which becomes a weight of zero mass.
template <class T>
inline constexpr T kEmptyNorm = T(1e-30);

// Of exp(q - the shared maximum) over a row: outside, the row gets a maximum of its own.
template <class T>
inline constexpr T kSmallSum = T(1) / 64;
template <class T>
inline constexpr T kLargeSum = 4096;

// Running normaliser of one head: arrays of round_up(L).
template <class T>
struct Normaliser {
  T* r;    // reference
  T* z;    // sum of exp(k - r)
  T* top;  // true maximum of the keys
};

enum class Operands {
  forward,           // ew = [e | w]
  gradient_forward,  // blocked = e; rows w and 1/z
  gradient_reverse,  // ew = [e | w], blocked = w
  keys_only,         // rows e
};

template <class T>
struct Prepared {
  T* ew = nullptr;
  T* blocked = nullptr;
  const T* p = nullptr;
  T *w = nullptr, *inverse_z = nullptr, *e = nullptr;
  int64_t row_stride = 0;           // of p, w, inverse_z and e
  const T* inverse_sums = nullptr;  // of the rows p, which are not normalised
  T* alpha = nullptr;               // blocked, a row per run; row 0 alone for a raised chunk
  T* limit = nullptr;               // scratch, a row
  Runs* runs = nullptr;             // of a rising chunk
};

// exp(q - max q) of one row, given as vectors q(l), into p, and 1 / its sum: 0 for a row without a
// usable latent.
template <class T, class Q>
inline T softmax_vectors(int64_t width, const Q& q, T* p) {
  Vec<T> m = q(0);
  for (int64_t l = kLanes<T>; l < width; l += kLanes<T>) m = max(m, q(l));
  const T highest = reduce_max<T>(m);
  const Vec<T> top = splat(highest >= kLowest<T> || highest != highest ? highest : T(0));
  Vec<T> sum = {};
  for (int64_t l = 0; l < width; l += kLanes<T>) {
    const Vec<T> e = exp(q(l) - top);
    sum += e;
    store(p + l, e);
  }
  const T total = reduce_add<T>(sum);
  return total == 0 ? 0 : 1 / total;
}

template <class T>
inline T softmax_row(int64_t width, const T* q, T* p) {
  return softmax_vectors(width, [&](int64_t l) { return load(q + l); }, p);
}

// The same for a chunk of rows q(t, l). They share the maximum of the first one, never of a later
// one, so that the future cannot change a bit of the past; that takes the reductions and divisions
// out of the rows (58 -> 37 cycles per token at L = 64, 100 -> 58 with AVX2). A row whose sum then
// is small, large or NaN is done again alone, so that the two maxima differ by log(64 L) at most
// and the error of q - top stays below 5e-7.
template <class T, class Q>
inline void softmax_rows(int64_t n, int64_t width, const Q& q, T* p, int64_t p_stride,
                         T* inverse_sums) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> m = q(0, 0);
  for (int64_t l = lanes; l < width; l += lanes) m = max(m, q(0, l));
  const T highest = reduce_max<T>(m);
  const bool usable = highest >= kLowest<T> && highest <= -kLowest<T>;
  const Vec<T> top = splat(usable ? highest : T(0));
  alignas(64) Vec<T> sums[kChunk];
  for (int64_t t = 0; t < n; ++t) {
    T* out = p + t * p_stride;
    Vec<T> sum = {};
    for (int64_t l = 0; l < width; l += lanes) {
      const Vec<T> e = exp_saturating(q(t, l) - top);
      sum += e;
      store(out + l, e);
    }
    sums[t] = sum;
  }
  for (int64_t t = n; t < (n + lanes - 1) / lanes * lanes; ++t) sums[t] = splat(T(1));
  for (int64_t first = 0; first < n; first += lanes) {
    const Vec<T> sum = sums_of<T>(sums + first);
    store(inverse_sums + first, 1 / sum);
    const auto usual = (sum >= kSmallSum<T>)&(sum <= kLargeSum<T>);
    const Vec<T> alone = select(usual, Vec<T>{}, splat(T(1)));
    if (!any_greater(alone, Vec<T>{})) continue;
    for (int64_t t = first; t < n && t < first + lanes; ++t)
      if (alone[t - first] > 0)
        inverse_sums[t] =
            softmax_vectors(width, [&](int64_t l) { return q(t, l); }, p + t * p_stride);
  }
}

// How the scan must take a chunk.
enum class Keys {
  ordinary,
  raised,  // the state before the chunk must be scaled by row 0 of out.alpha
  rising,  // out.alpha holds a decay per run
  tied,    // some latent's keys repeat
};

// Lags at which a key is compared with the chunk's first: every period up to 8 divides two of them.
inline constexpr int64_t kTieLags[] = {24, 40, 42, 48, 56, 60};

// The maxima of U vectors of keys into `out`, which is blocked. A NaN key is passed over: it must
// not hide the rise of a key before it, and spoils z and every later row by itself.
template <class T, int U>
LATTE_INLINE void highest_keys(int64_t n, int64_t l, const T* k, int64_t k_stride, T* out) {
  Vec<T> m[U];
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) m[u] = load(k + l + u * kLanes<T>);
  for (int64_t t = 1; t < n; ++t)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) m[u] = max(load(k + t * k_stride + l + u * kLanes<T>), m[u]);
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u) store(blocked(out, 0, l + u * kLanes<T>), m[u]);
}

// Moves the reference of an empty latent to its first key for free, notes the maximum (also in row
// 0 of alpha), and looks for a key above the margin and for ties. Equal additions all round the
// same way: tied keys made the state drift by 4e-4 of its size in 65,536 tokens, where differing
// keys leave 7e-6. Two equal lags count as tied, which random keys of 8 bits are in 1 chunk of
// 4,400 per latent.
template <class T>
inline Keys classify_keys(int64_t n, int64_t width, const T* k, int64_t k_stride,
                          const Normaliser<T>& norm, T* alpha) {
  int64_t c = 0;
  // One maximum at a time would wait for itself, 4 cycles per key.
  for (; c + 4 * kLanes<T> <= width; c += 4 * kLanes<T>)
    highest_keys<T, 4>(n, c, k, k_stride, alpha);
  for (; c < width; c += kLanes<T>) highest_keys<T, 1>(n, c, k, k_stride, alpha);
  Vec<T> excess = {};
  bool tied = false;
  for (int64_t l = 0; l < width; l += kLanes<T>) {
    const Vec<T> key = load(k + l), m = load(blocked(alpha, 0, l));
    const Vec<T> r0 = load(norm.r + l);
    const Vec<T> r = select(load(norm.z + l) > 0, r0, max(r0, key));
    store(norm.r + l, r);
    store(norm.top + l, max(load(norm.top + l), m));
    excess = max(m - r, excess);
    Vec<T> ties = {};
    for (const int64_t t : kTieLags)
      if (t < n) {
        const auto tie = (load(k + t * k_stride + l) == key) & (key >= kLowest<T>);
        ties += select(tie, splat(T(1)), Vec<T>{});
      }
    tied |= any_greater(ties, splat(T(1)));
  }
  if (any_greater(excess, splat(kHighestRaise<T>))) return Keys::rising;
  if (any_greater(excess, splat(kLazyMargin<T>))) return Keys::raised;
  return tied ? Keys::tied : Keys::ordinary;
}

// Raises the reference to the maxima in row 0 of alpha, and leaves there what that does to S.
template <class T>
inline void raise_reference(int64_t width, const Normaliser<T>& norm, T* alpha) {
  for (int64_t l = 0; l < width; l += kLanes<T>) {
    const Vec<T> r = load(norm.r + l), raised = max(r, load(blocked(alpha, 0, l)));
    const Vec<T> factor = exp(r - raised);
    store(norm.r + l, raised);
    store(norm.z + l, load(norm.z + l) * factor);
    store(blocked(alpha, 0, l), factor);
  }
}

// Cuts a chunk into runs, each as long as no key of it is above what its first token leaves the
// reference at by more than kHighestRaise. Row i of alpha gets the reference of run i.
template <class T>
inline void find_runs(int64_t n, int64_t width, const T* k, int64_t k_stride,
                      const Normaliser<T>& norm, const Prepared<T>& out) {
  Runs& runs = *out.runs;
  runs.count = 0;
  for (int64_t t = 0; t < n; ++t, k += k_stride) {
    Vec<T> excess = {};
    for (int64_t l = 0; l < width && t > 0; l += kLanes<T>)
      excess = max(load(k + l) - load(out.limit + l), excess);
    const bool rises = t == 0 || any_greater(excess, Vec<T>{});
    if (rises) runs.first[runs.count++] = t;
    for (int64_t l = 0; l < width; l += kLanes<T>) {
      const T* const before =
          t == 0 ? norm.r + l : blocked(out.alpha, runs.count - (rises ? 2 : 1), l);
      // A NaN key is passed over, as above.
      const Vec<T> reference = max(load(k + l), load(before));
      store(blocked(out.alpha, runs.count - 1, l), reference);
      if (rises) store(out.limit + l, reference + kHighestRaise<T>);
    }
  }
  runs.first[runs.count] = n;
}

// How a chunk's keys become weights.
enum class Pace {
  ordinary,  // no latent is empty, no key is below r - 1e26: to be checked
  careful,   // any keys; a sum of the chunk's own if asked for
  rising,    // with a decay per run
};

// Two short passes over U vectors of latents instead of one chain exp -> z -> 1/z -> w per vector,
// which outgrows the scheduler (57 -> 46 ns per token at L = 64). False: at this pace it cannot be
// done, and the normaliser is as it was.
template <class T, Operands kOperands, int U, Pace kPace>
inline bool prepare_latents(int64_t n, int64_t l, const T* k, int64_t k_stride, Normaliser<T> norm,
                            Prepared<T> out, bool own_sum) {
  constexpr int64_t lanes = kLanes<T>;
  constexpr bool ordinary = kPace == Pace::ordinary, rising = kPace == Pace::rising;
  if (n < 1) __builtin_unreachable();
  alignas(64) T e[kChunk * U * lanes];
  {
    Vec<T> r[U];
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) r[u] = load(norm.r + l + u * lanes);
    const T* row = k + l;
    for (int64_t t = 0, run = 0; t < n; ++t, row += k_stride) {
      if (rising && t == out.runs->first[run]) {
#pragma GCC unroll 2
        for (int u = 0; u < U; ++u) {
          T* const alpha = blocked(out.alpha, run, l + u * lanes);
          const Vec<T> raised = load(alpha);
          store(alpha, exp(r[u] - raised));
          r[u] = raised;
        }
        ++run;
      }
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) {
        const Vec<T> exponent = load(row + u * lanes) - r[u];
        store(e + (t * U + u) * lanes, ordinary ? exp_unbounded(exponent) : exp(exponent));
      }
    }
    if constexpr (rising) {
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) store(norm.r + l + u * lanes, r[u]);
    }
  }
  // In the order in which the scan adds, so that z and S err alike and constant values stay so.
  Vec<T> before[U], sum[U];
#pragma GCC unroll 2
  for (int u = 0; u < U; ++u) {
    const Vec<T> z = load(norm.z + l + u * lanes);
    before[u] = own_sum ? z : Vec<T>{};
    sum[u] = own_sum ? Vec<T>{} : z;
    if (ordinary && any_greater(splat(kEmptyNorm<T>), z + load(e + u * lanes))) return false;
  }
  for (int64_t t = 0, run = 0; t < n; ++t) {
    if (rising && t == out.runs->first[run]) {
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) sum[u] *= load(blocked(out.alpha, run, l + u * lanes));
      ++run;
    }
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      const int64_t c = l + u * lanes;
      const Vec<T> weight = load(e + (t * U + u) * lanes);
      sum[u] += weight;
      if constexpr (kOperands == Operands::keys_only) {
        store(out.e + t * out.row_stride + c, weight);
      } else {
        const Vec<T> z = ordinary ? sum[u] : max(before[u] + sum[u], splat(kEmptyNorm<T>));
        const Vec<T> p = load(out.p + t * out.row_stride + c) * out.inverse_sums[t];
        const Vec<T> inverse = reciprocal(z), w = p * inverse;
        if constexpr (kOperands == Operands::gradient_forward) {
          store(out.w + t * out.row_stride + c, w);
          store(out.inverse_z + t * out.row_stride + c, inverse);
          store(blocked(out.blocked, t, c), weight);
        } else {
          store_pair(out.ew, t, c, weight, w);
          if constexpr (kOperands == Operands::gradient_reverse)
            store(blocked(out.blocked, t, c), w);
        }
      }
    }
  }
  if constexpr (ordinary) {
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u)
      if (!all_finite(sum[u])) return false;
  }
#pragma GCC unroll 2
  for (int u = 0; u < U; ++u) store(norm.z + l + u * lanes, before[u] + sum[u]);
  return true;
}

template <class T, Operands kOperands, Pace kPace>
inline void prepare_all(int64_t n, int64_t width, const T* k, int64_t k_stride,
                        const Normaliser<T>& norm, const Prepared<T>& out, bool own_sum) {
  int64_t l = 0;
  for (; l + 2 * kLanes<T> <= width; l += 2 * kLanes<T>)
    if (!prepare_latents<T, kOperands, 2, kPace>(n, l, k, k_stride, norm, out, own_sum))
      prepare_latents<T, kOperands, 2, Pace::careful>(n, l, k, k_stride, norm, out, own_sum);
  if (l < width && !prepare_latents<T, kOperands, 1, kPace>(n, l, k, k_stride, norm, out, own_sum))
    prepare_latents<T, kOperands, 1, Pace::careful>(n, l, k, k_stride, norm, out, own_sum);
}

// Prepares n <= kChunk tokens, whose softmax_rows() are in p, and advances the normaliser.
template <class T, Operands kOperands>
inline Keys prepare(int64_t n, int64_t width, const T* k, int64_t k_stride,
                    const Normaliser<T>& norm, const Prepared<T>& out) {
  const Keys keys = classify_keys(n, width, k, k_stride, norm, out.alpha);
  if (keys == Keys::raised) raise_reference(width, norm, out.alpha);
  if (keys == Keys::rising) {
    find_runs(n, width, k, k_stride, norm, out);
    prepare_all<T, kOperands, Pace::rising>(n, width, k, k_stride, norm, out, false);
  } else if (kOperands == Operands::keys_only || keys == Keys::tied) {
    prepare_all<T, kOperands, Pace::careful>(n, width, k, k_stride, norm, out, true);
  } else {
    prepare_all<T, kOperands, Pace::ordinary>(n, width, k, k_stride, norm, out, false);
  }
  return keys;
}

}  // namespace latte::LATTE_ISA
