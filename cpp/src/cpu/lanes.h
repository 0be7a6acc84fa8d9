// SPDX-License-Identifier: Apache-2.0
// What simd.h needs of a compiler that has neither the vector extensions nor the builtins of GCC
// and Clang (LATTE_SCALAR): a vector is a structure of lanes, every operation a loop.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(_MSC_VER) && !defined(__clang__)
#define LATTE_INLINE __forceinline
#define LATTE_NOINLINE __declspec(noinline)
#else
#define LATTE_INLINE __attribute__((always_inline)) inline
#define LATTE_NOINLINE __attribute__((noinline))
#endif

// Under the builtins' names, so that the kernels are one text; here they are the C library's.
#define __builtin_memcpy memcpy
#define __builtin_memset memset
#define __builtin_inf() HUGE_VAL
#define __builtin_exp ::exp
#define __builtin_exp2 ::exp2
#define __builtin_expm1 ::expm1
#define __builtin_log ::log
#define __builtin_log1p ::log1p
#define __builtin_logf ::logf
#define __builtin_sin ::sin
#define __builtin_cos ::cos
#define __builtin_sqrt ::sqrt
#define __builtin_tanh ::tanh
#define __builtin_unreachable() static_cast<void>(0)
#define __builtin_prefetch(address, ...) static_cast<void>(address)
#define __builtin_add_overflow ::latte::LATTE_ISA::add_overflows
#define __builtin_sub_overflow ::latte::LATTE_ISA::sub_overflows
#define __builtin_convertvector(vector, ...) \
  ::latte::LATTE_ISA::converted_lanes<__VA_ARGS__>(vector)
#define __builtin_shufflevector(a, b, ...) ::latte::LATTE_ISA::shuffled_lanes<__VA_ARGS__>(a, b)

namespace latte::LATTE_ISA {

LATTE_INLINE bool add_overflows(int64_t a, int64_t b, int64_t* sum) {
  *sum = static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
  return ((a ^ *sum) & (b ^ *sum)) < 0;
}
LATTE_INLINE bool sub_overflows(int64_t a, int64_t b, int64_t* difference) {
  *difference = static_cast<int64_t>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
  return ((a ^ b) & (a ^ *difference)) < 0;
}

template <class T>
struct IntegerOf {
  using type = T;
};
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

template <class T, int kCount>
struct Lanes {
  T lane[kCount];

  LATTE_INLINE T& operator[](int64_t i) { return lane[i]; }
  LATTE_INLINE const T& operator[](int64_t i) const { return lane[i]; }

  // Of the same size: the same bits, as a cast between vectors.
  template <class U, int kOther>
  LATTE_INLINE explicit operator Lanes<U, kOther>() const {
    static_assert(sizeof(Lanes<U, kOther>) == sizeof(Lanes));
    Lanes<U, kOther> y;
    memcpy(&y, this, sizeof y);
    return y;
  }
};

template <class T, int kCount>
LATTE_INLINE Lanes<T, kCount> operator-(Lanes<T, kCount> a) {
  for (int i = 0; i < kCount; ++i) a.lane[i] = -a.lane[i];
  return a;
}
template <class T, int kCount>
LATTE_INLINE Lanes<T, kCount> operator~(Lanes<T, kCount> a) {
  for (int i = 0; i < kCount; ++i) a.lane[i] = ~a.lane[i];
  return a;
}

// A number beside a vector stands in every lane.
template <class T, int kCount>
LATTE_INLINE Lanes<T, kCount> all_lanes(T x) {
  Lanes<T, kCount> y;
  for (int i = 0; i < kCount; ++i) y.lane[i] = x;
  return y;
}
template <class S>
concept Number = std::is_arithmetic_v<S>;

#define LATTE_BESIDE_NUMBERS(OPERATOR)                           \
  template <class T, int kCount, Number S>                       \
  LATTE_INLINE auto operator OPERATOR(Lanes<T, kCount> a, S b) { \
    return a OPERATOR all_lanes<T, kCount>(static_cast<T>(b));   \
  }                                                              \
  template <class T, int kCount, Number S>                       \
  LATTE_INLINE auto operator OPERATOR(S a, Lanes<T, kCount> b) { \
    return all_lanes<T, kCount>(static_cast<T>(a)) OPERATOR b;   \
  }
#define LATTE_ARITHMETIC(OPERATOR, ASSIGNMENT)                                              \
  template <class T, int kCount>                                                            \
  LATTE_INLINE Lanes<T, kCount> operator OPERATOR(Lanes<T, kCount> a, Lanes<T, kCount> b) { \
    for (int i = 0; i < kCount; ++i) a.lane[i] = a.lane[i] OPERATOR b.lane[i];              \
    return a;                                                                               \
  }                                                                                         \
  LATTE_BESIDE_NUMBERS(OPERATOR)                                                            \
  template <class T, int kCount, class V>                                                   \
  LATTE_INLINE Lanes<T, kCount>& operator ASSIGNMENT(Lanes<T, kCount>& a, V b) {            \
    return a = a OPERATOR b;                                                                \
  }
// All bits of a lane where it holds, none where it does not.
#define LATTE_COMPARISON(OPERATOR)                                                      \
  template <class T, int kCount>                                                        \
  LATTE_INLINE auto operator OPERATOR(Lanes<T, kCount> a, Lanes<T, kCount> b) {         \
    Lanes<typename IntegerOf<T>::type, kCount> y;                                       \
    for (int i = 0; i < kCount; ++i) y.lane[i] = a.lane[i] OPERATOR b.lane[i] ? -1 : 0; \
    return y;                                                                           \
  }                                                                                     \
  LATTE_BESIDE_NUMBERS(OPERATOR)

LATTE_ARITHMETIC(+, +=)
LATTE_ARITHMETIC(-, -=)
LATTE_ARITHMETIC(*, *=)
LATTE_ARITHMETIC(/, /=)
LATTE_ARITHMETIC(&, &=)
LATTE_ARITHMETIC(|, |=)
LATTE_ARITHMETIC(^, ^=)
LATTE_ARITHMETIC(<<, <<=)
LATTE_COMPARISON(==)
LATTE_COMPARISON(<)
LATTE_COMPARISON(<=)
LATTE_COMPARISON(>)
LATTE_COMPARISON(>=)

#undef LATTE_COMPARISON
#undef LATTE_ARITHMETIC
#undef LATTE_BESIDE_NUMBERS

template <class V, class T, int kCount>
LATTE_INLINE V converted_lanes(Lanes<T, kCount> x) {
  V y;
  for (int i = 0; i < kCount; ++i)
    y[i] = static_cast<std::remove_reference_t<decltype(y[i])>>(x[i]);
  return y;
}
template <int... kIndex, class T, int kCount>
LATTE_INLINE Lanes<T, sizeof...(kIndex)> shuffled_lanes(Lanes<T, kCount> a, Lanes<T, kCount> b) {
  return {{(kIndex < kCount ? a : b).lane[kIndex % kCount]...}};
}

template <class M, class T, int kCount>
LATTE_INLINE Lanes<T, kCount> select(Lanes<M, kCount> mask, Lanes<T, kCount> a,
                                     Lanes<T, kCount> b) {
  for (int i = 0; i < kCount; ++i)
    if (!mask.lane[i]) a.lane[i] = b.lane[i];
  return a;
}

}  // namespace latte::LATTE_ISA
