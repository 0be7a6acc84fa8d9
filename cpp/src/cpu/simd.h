// SPDX-License-Identifier: Apache-2.0
// The only file with vector types and intrinsics. It is compiled once per instruction set into the
// namespace LATTE_ISA, with the compiler's flags choosing the width. No function of std:: may be
// instantiated below this include: the linker could pick its AVX-512 copy for every machine.
//
// Everything is written with the vector extensions of GCC and Clang; an intrinsic stands only where
// those give no way to ask for the instruction (rounding, scalef, reciprocal, half conversion).
// LATTE_SCALAR does without either: lanes.h.
#pragma once

#include <cstdint>
#if defined(LATTE_SCALAR)
#define LATTE_VECTOR_BYTES 16
#include "cpu/lanes.h"
#else
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#define LATTE_NEON
#endif
#if defined(__SSE2__)
#define LATTE_SSE2
#endif

#if defined(__AVX512F__)
#define LATTE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LATTE_VECTOR_BYTES 32
#else
#define LATTE_VECTOR_BYTES 16
#endif

#define LATTE_INLINE __attribute__((always_inline)) inline
#define LATTE_NOINLINE __attribute__((noinline))
#endif

namespace latte::LATTE_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

#if defined(LATTE_SCALAR)
template <class T>
struct VectorOf {
  using type = Lanes<T, LATTE_VECTOR_BYTES / sizeof(T)>;
  using integer = Lanes<typename IntegerOf<T>::type, LATTE_VECTOR_BYTES / sizeof(T)>;
};
using HalfF = Lanes<float, LATTE_VECTOR_BYTES / 8>;
#else
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(LATTE_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(LATTE_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(LATTE_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(LATTE_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(LATTE_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(LATTE_VECTOR_BYTES)));
};
typedef float HalfF __attribute__((vector_size(LATTE_VECTOR_BYTES / 2)));
#endif

template <class T>
using Vec = typename VectorOf<T>::type;
using VecF = Vec<float>;
using VecD = Vec<double>;

template <class T>
inline constexpr int64_t kLanes = LATTE_VECTOR_BYTES / sizeof(T);

#if defined(LATTE_SCALAR)
template <class T>
LATTE_INLINE Vec<T> load(const T* p) {
  Vec<T> x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
LATTE_INLINE void store(T* p, Vec<T> x) {
  memcpy(p, &x, sizeof x);
}
#else
template <class T>
LATTE_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
LATTE_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = x;
}
// Lane by lane, as a comparison says. A function, since no class can have a `?:`.
template <class M, class V>
LATTE_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}
#endif

// Not `Vec{} + x`: 0 + -0.0 keeps GCC from a plain broadcast, measured at up to 35 % of a scan.
#if LATTE_VECTOR_BYTES == 64
LATTE_INLINE VecF splat(float x) { return (VecF)_mm512_set1_ps(x); }
LATTE_INLINE VecD splat(double x) { return (VecD)_mm512_set1_pd(x); }
#elif LATTE_VECTOR_BYTES == 32
LATTE_INLINE VecF splat(float x) { return (VecF)_mm256_set1_ps(x); }
LATTE_INLINE VecD splat(double x) { return (VecD)_mm256_set1_pd(x); }
#else
LATTE_INLINE VecF splat(float x) { return VecF{x, x, x, x}; }
LATTE_INLINE VecD splat(double x) { return VecD{x, x}; }
#endif

// The second operand wins when either is NaN, so put the operand whose NaN must survive there.
#if LATTE_VECTOR_BYTES == 64
LATTE_INLINE VecF max(VecF a, VecF b) { return (VecF)_mm512_max_ps((__m512)a, (__m512)b); }
LATTE_INLINE VecD max(VecD a, VecD b) { return (VecD)_mm512_max_pd((__m512d)a, (__m512d)b); }
#elif LATTE_VECTOR_BYTES == 32
LATTE_INLINE VecF max(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }
LATTE_INLINE VecD max(VecD a, VecD b) { return (VecD)_mm256_max_pd((__m256d)a, (__m256d)b); }
#else
LATTE_INLINE VecF max(VecF a, VecF b) { return select(a > b, a, b); }
LATTE_INLINE VecD max(VecD a, VecD b) { return select(a > b, a, b); }
#endif

#if LATTE_VECTOR_BYTES == 64
LATTE_INLINE VecF min(VecF a, VecF b) { return (VecF)_mm512_min_ps((__m512)a, (__m512)b); }
LATTE_INLINE VecD min(VecD a, VecD b) { return (VecD)_mm512_min_pd((__m512d)a, (__m512d)b); }
#elif LATTE_VECTOR_BYTES == 32
LATTE_INLINE VecF min(VecF a, VecF b) { return (VecF)_mm256_min_ps((__m256)a, (__m256)b); }
LATTE_INLINE VecD min(VecD a, VecD b) { return (VecD)_mm256_min_pd((__m256d)a, (__m256d)b); }
#else
LATTE_INLINE VecF min(VecF a, VecF b) { return select(a < b, a, b); }
LATTE_INLINE VecD min(VecD a, VecD b) { return select(a < b, a, b); }
#endif

template <class V>
LATTE_INLINE bool any_greater(V a, V b) {
  const auto mask = a > b;
  int64_t any = 0;
  for (uint64_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i) any |= mask[i];
  return any != 0;
}
#if LATTE_VECTOR_BYTES == 64
template <>
LATTE_INLINE bool any_greater(VecF a, VecF b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
}
template <>
LATTE_INLINE bool any_greater(VecD a, VecD b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) != 0;
}
#elif LATTE_VECTOR_BYTES == 32
template <>
LATTE_INLINE bool any_greater(VecF a, VecF b) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
}
template <>
LATTE_INLINE bool any_greater(VecD a, VecD b) {
  return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)b, _CMP_GT_OQ)) != 0;
}
#elif defined(LATTE_NEON)
template <>
LATTE_INLINE bool any_greater(VecF a, VecF b) {
  return vmaxvq_u32((uint32x4_t)(a > b)) != 0;
}
#endif

template <class V>
LATTE_INLINE bool all_finite(V x) {
  return !any_greater(V{} + 1, select(x - x == V{}, V{} + 1, V{}));
}

// Fixed reduction trees: the same bits for the same row, whatever surrounds it (T7).
template <class T>
LATTE_INLINE T reduce_add(Vec<T> x) {
  T lane[kLanes<T>];
  store(lane, x);
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
template <class T>
LATTE_INLINE T reduce_max(Vec<T> x) {
  T lane[kLanes<T>];
  store(lane, x);
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i)
      lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}
#if LATTE_VECTOR_BYTES == 64
template <>
LATTE_INLINE float reduce_add<float>(VecF x) {
  return _mm512_reduce_add_ps((__m512)x);
}
template <>
LATTE_INLINE float reduce_max<float>(VecF x) {
  return _mm512_reduce_max_ps((__m512)x);
}
#elif defined(LATTE_NEON)
template <>
LATTE_INLINE float reduce_max<float>(VecF x) {
  return vmaxvq_f32((float32x4_t)x);
}
#endif

// [a0 + a1, a2 + a3, .., b0 + b1, b2 + b3, ..]
LATTE_INLINE VecF pair_sums(VecF a, VecF b) {
#if LATTE_VECTOR_BYTES == 64
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif LATTE_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}
LATTE_INLINE VecD pair_sums(VecD a, VecD b) {
#if LATTE_VECTOR_BYTES == 64
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#elif LATTE_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#else
  return __builtin_shufflevector(a, b, 0, 2) + __builtin_shufflevector(a, b, 1, 3);
#endif
}
// The sums of as many vectors as a vector has lanes, in order.
template <class T, int kCount = kLanes<T>>
LATTE_INLINE Vec<T> sums_of(const Vec<T>* x) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    Vec<T> half[kCount / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) half[i] = pair_sums(x[2 * i], x[2 * i + 1]);
    return sums_of<T, kCount / 2>(half);
  }
}

// 1/x for normal x. vrcp14ps and one Newton step are within 1 ulp of the division and leave the
// divider alone (a 512-bit vdivps blocks it for 16 to 24 cycles).
template <class V>
LATTE_INLINE V reciprocal(V x) {
  return 1 / x;
}
#if LATTE_VECTOR_BYTES == 64
template <>
LATTE_INLINE VecF reciprocal(VecF x) {
  const VecF r = (VecF)_mm512_rcp14_ps((__m512)x);
  return r * (2.0f - x * r);
}
#endif

// [a.low | b.low] and [a.high | b.high].
#if LATTE_VECTOR_BYTES == 64
LATTE_INLINE VecF low_halves(VecF a, VecF b) {
  return (VecF)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44);
}
LATTE_INLINE VecF high_halves(VecF a, VecF b) {
  return (VecF)_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xEE);
}
LATTE_INLINE VecD low_halves(VecD a, VecD b) { return (VecD)low_halves((VecF)a, (VecF)b); }
LATTE_INLINE VecD high_halves(VecD a, VecD b) { return (VecD)high_halves((VecF)a, (VecF)b); }
#elif LATTE_VECTOR_BYTES == 32
LATTE_INLINE VecF low_halves(VecF a, VecF b) {
  return (VecF)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20);
}
LATTE_INLINE VecF high_halves(VecF a, VecF b) {
  return (VecF)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31);
}
LATTE_INLINE VecD low_halves(VecD a, VecD b) { return (VecD)low_halves((VecF)a, (VecF)b); }
LATTE_INLINE VecD high_halves(VecD a, VecD b) { return (VecD)high_halves((VecF)a, (VecF)b); }
#else
LATTE_INLINE VecF low_halves(VecF a, VecF b) { return VecF{a[0], a[1], b[0], b[1]}; }
LATTE_INLINE VecF high_halves(VecF a, VecF b) { return VecF{a[2], a[3], b[2], b[3]}; }
LATTE_INLINE VecD low_halves(VecD a, VecD b) { return VecD{a[0], b[0]}; }
LATTE_INLINE VecD high_halves(VecD a, VecD b) { return VecD{a[1], b[1]}; }
#endif

// [a0, b0, a1, b1, ...] from the lower and from the upper halves of the lanes.
#if LATTE_VECTOR_BYTES == 64
LATTE_INLINE VecF interleave_low(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
LATTE_INLINE VecF interleave_high(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
}
LATTE_INLINE VecD interleave_low(VecD a, VecD b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
LATTE_INLINE VecD interleave_high(VecD a, VecD b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#elif LATTE_VECTOR_BYTES == 32
LATTE_INLINE VecF interleave_low(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
LATTE_INLINE VecF interleave_high(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
LATTE_INLINE VecD interleave_low(VecD a, VecD b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
LATTE_INLINE VecD interleave_high(VecD a, VecD b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}
#else
LATTE_INLINE VecF interleave_low(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
LATTE_INLINE VecF interleave_high(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}
LATTE_INLINE VecD interleave_low(VecD a, VecD b) { return VecD{a[0], b[0]}; }
LATTE_INLINE VecD interleave_high(VecD a, VecD b) { return VecD{a[1], b[1]}; }
#endif

// [a1, a0, a3, a2, ...]
#if LATTE_VECTOR_BYTES == 64
LATTE_INLINE VecF swap_neighbours(VecF a) {
  return __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}
LATTE_INLINE VecD swap_neighbours(VecD a) {
  return __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6);
}
#elif LATTE_VECTOR_BYTES == 32
LATTE_INLINE VecF swap_neighbours(VecF a) {
  return __builtin_shufflevector(a, a, 1, 0, 3, 2, 5, 4, 7, 6);
}
LATTE_INLINE VecD swap_neighbours(VecD a) { return __builtin_shufflevector(a, a, 1, 0, 3, 2); }
#else
LATTE_INLINE VecF swap_neighbours(VecF a) { return __builtin_shufflevector(a, a, 1, 0, 3, 2); }
LATTE_INLINE VecD swap_neighbours(VecD a) { return __builtin_shufflevector(a, a, 1, 0); }
#endif

// The lanes of `low`, then those of `high`.
LATTE_INLINE VecF narrow(VecD low, VecD high) {
  const HalfF a = __builtin_convertvector(low, HalfF), b = __builtin_convertvector(high, HalfF);
#if LATTE_VECTOR_BYTES == 64
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif LATTE_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return __builtin_shufflevector(a, b, 0, 1, 2, 3);
#endif
}

// exp(x) for x <= 88, below 2.5 + |x| / 20 ulp, from x = n log(2) + r. n times the float
// nearest to log(2) is exact in a fused multiply-add, and that float is right to 1.9e-9: no second
// step is needed. exp(0) == 1 exactly (a kept key must not decay), exp(-inf) == 0; NaN passes.
inline constexpr float kLog2E = 1.44269504088896341f;
template <class T>
inline constexpr T kLog2 = T(0.693147180559945309417);
#if LATTE_VECTOR_BYTES == 64
// 2^(i / 32).
alignas(64) inline constexpr float kExp2Table[32] = {
    1.0f,        1.02189715f, 1.04427378f, 1.0671404f,  1.09050773f, 1.11438674f, 1.13878863f,
    1.16372486f, 1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f, 1.29683955f, 1.32523664f,
    1.35425555f, 1.38390988f, 1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f,
    1.57598085f, 1.61049033f, 1.64575548f, 1.68179283f, 1.7186193f,  1.75625216f, 1.79470908f,
    1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f};
// n in steps of 1/32: its fraction is a lookup and |r| <= log(2) / 64 leaves a polynomial of two
// terms (11 operations with the sum of a softmax; with steps of 1 and five terms, 14).
LATTE_INLINE VecF exp_unbounded(VecF x) {
  // Adding 1.5 * 2^18 rounds to a multiple of 1/32 and leaves 32 n in the low bits.
  const __m512 magic = _mm512_set1_ps(393216.0f);
  const __m512 shifted = _mm512_fmadd_ps((__m512)x, _mm512_set1_ps(kLog2E), magic);
  const __m512 n = _mm512_sub_ps(shifted, magic);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLog2<float>), (__m512)x);
  const __m512 root = _mm512_permutex2var_ps(_mm512_load_ps(kExp2Table), (__m512i)shifted,
                                             _mm512_load_ps(kExp2Table + 16));
  const __m512 q =
      _mm512_mul_ps(_mm512_fmadd_ps(_mm512_set1_ps(0.5f), r, _mm512_set1_ps(1.000014642f)), r);
  // scalef takes the floor of n, and of a NaN times 2^-inf, which is what -inf comes to, it makes
  // 0.
  return (VecF)_mm512_scalef_ps(_mm512_fmadd_ps(root, q, root), n);
}
LATTE_INLINE VecF exp(VecF x) {
  // exp(-200) is 0 after scalef.
  return exp_unbounded((VecF)_mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x));
}
#elif LATTE_VECTOR_BYTES == 32
// 2^(i / 8).
alignas(32) inline constexpr float kExp2Table[8] = {
    1.0f, 1.09050775f, 1.18920708f, 1.29683959f, 1.41421354f, 1.54221082f, 1.68179286f, 1.8340081f};
// n in steps of 1/8, so that |r| <= log(2) / 16 leaves three terms, minimax within 2.7e-8; lookup
// and sum of the exponent take a port that multiplies nothing (9 operations on the other two, with
// steps of 1 and five terms 11).
LATTE_INLINE VecF exp(VecF x) {
  using VecI = VectorOf<float>::integer;
  // Adding 1.5 * 2^20 rounds to a multiple of 1/8 and leaves 8 n in the low bits.
  const __m256 magic = _mm256_set1_ps(1572864.0f);
  const __m256 shifted = _mm256_fmadd_ps((__m256)x, _mm256_set1_ps(kLog2E), magic);
  const VecF r = (VecF)_mm256_fnmadd_ps(_mm256_sub_ps(shifted, magic), _mm256_set1_ps(kLog2<float>),
                                        (__m256)x);
  // 8 n shifted to the exponent is 2^n, but for its fraction i / 8, which the root brings.
  const VecI eighths = {0, 1, 2, 3, 4, 5, 6, 7};
  const VecI roots = (VecI)_mm256_load_ps(kExp2Table) - (eighths << 20);
  const VecI root = (VecI)_mm256_permutevar8x32_epi32((__m256i)roots, (__m256i)shifted);
  // An intrinsic: a NaN's sum may wrap.
  const __m256 power = (__m256)_mm256_add_epi32((__m256i)root, (__m256i)((VecI)shifted << 20));
  const VecF q = (1.666685790e-01f * r + 5.000645518e-01f) * (r * r) + r;
  // Fused in every build: close to -87 the product alone is subnormal, and flushed.
  const VecF y = (VecF)_mm256_fmadd_ps(power, (__m256)q, power);
  return (VecF)((VecI)y & ~(VecI)(x < -87.0f));
}
#else
LATTE_INLINE VecF exp(VecF x) {
  using VecI = VectorOf<float>::integer;
  // Adding 1.5 * 2^23 + 127 rounds to an integer n and leaves n + 127, the exponent field of 2^n,
  // in the low bits of the mantissa. 2^n multiplies p: added to p's exponent, the bits that a NaN
  // has there turned 0xFFFFFFFF into the lowest finite number.
  const VecF magic = splat(12583039.0f);
#if defined(LATTE_NEON)
  const float32x4_t shifted = vfmaq_f32((float32x4_t)magic, (float32x4_t)x, vdupq_n_f32(kLog2E));
  const VecF r = (VecF)vfmsq_f32((float32x4_t)x, vsubq_f32(shifted, (float32x4_t)magic),
                                 vdupq_n_f32(kLog2<float>));
  const VecF z = (VecF)shifted;
#else
  // Without fused multiply-add r comes from Cody and Waite's split of log(2), which needs the
  // compiler to contract nothing: the baseline is built with -ffp-contract=off.
  const VecF z = x * kLog2E + magic;
  const VecF n = z - magic;
  const VecF r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
#endif
  VecF p = 8.290314724e-03f * r + 4.189792931e-02f;
  p = p * r + 1.666763619e-01f;
  p = p * r + 4.999914953e-01f;
  p = p * r + 9.999997072e-01f;
  const VecF y = (p * r + 1.0f) * (VecF)((VecI)z << 23);
  return (VecF)((VecI)y & ~(VecI)(x < -87.0f));
}
#endif
LATTE_INLINE VecD exp(VecD x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// For results that are checked afterwards. exp_unbounded(x) is exp(x) for x <= 88, but for finite
// x < -1e26 it may be NaN or infinite, which with AVX-512 saves an operation of ten;
// exp_saturating(x) may be so for x > 88 as well, or just more than 1e38.
#if LATTE_VECTOR_BYTES == 64
LATTE_INLINE VecD exp_unbounded(VecD x) { return exp(x); }
template <class V>
LATTE_INLINE V exp_saturating(V x) {
  return exp_unbounded(x);
}
#else
template <class V>
LATTE_INLINE V exp_unbounded(V x) {
  return exp(x);
}
template <class V>
LATTE_INLINE V exp_saturating(V x) {
  return exp(min(V{} + 88, x));
}
#endif

template <class T>
LATTE_INLINE T exp_scalar(T x) {
  return exp(splat(x))[0];
}
LATTE_INLINE float log_scalar(float x) { return __builtin_logf(x); }
LATTE_INLINE double log_scalar(double x) { return __builtin_log(x); }

// 2^x - 1 for x <= 0, and 2^x in `e`, each with a small relative error of its own: both come from
// 2^x = 2^n (1 + f (log(2) + ..)), of which a minimax polynomial for |f| <= 1/2 is within 2.1e-8.
// Below -126 e stays at the smallest normal number; NaN passes.
LATTE_INLINE VecF exp2m1(VecF x, VecF& e) {
  using VecI = VectorOf<float>::integer;
  const VecF bounded = max(splat(-126.0f), x);
  // As in exp(): n + 127 in the low bits of z. The difference to n is exact.
  const VecF magic = splat(12583039.0f);
  const VecF z = bounded + magic;
  const VecF f = bounded - (z - magic);
  VecF p = 1.540351223e-04f * f + 1.339073526e-03f;
  p = p * f + 9.618237615e-03f;
  p = p * f + 5.550357327e-02f;
  p = p * f + 2.402264923e-01f;
  p = p * f + 6.931471825e-01f;
  const VecF scale = (VecF)((VecI)z << 23), fraction = scale * (p * f);
  e = scale + fraction;
  return fraction + (scale - 1.0f);
}
LATTE_INLINE VecD exp2m1(VecD x, VecD& e) {
  for (int64_t i = 0; i < kLanes<double>; ++i) {
    e[i] = __builtin_exp2(x[i]);
    x[i] = __builtin_expm1(x[i] * 0.693147180559945309417);
  }
  return x;
}

// tanh(x) to 4e-7 of itself, and to 1e-14 in double. Below 0.625 1 - exp would cancel: there an odd
// polynomial, minimax in x^2, is within 4.4e-9. tanh(+-inf) = +-1; NaN passes.
LATTE_INLINE VecF tanh(VecF x) {
  using VecI = VectorOf<float>::integer;
  const VecI sign = (VecI)x & INT32_MIN;
  const VecF magnitude = (VecF)((VecI)x ^ sign), square = x * x;
  VecF p = -5.704985013e-03f * square + 2.063908549e-02f;
  p = p * square - 5.373971455e-02f;
  p = p * square + 1.333144219e-01f;
  p = p * square - 3.333328194e-01f;
  const VecF small = p * square * magnitude + magnitude;
  const VecF e = exp(-2.0f * magnitude);
  const VecF large = 1.0f - 2.0f * e * reciprocal(1.0f + e);
  return (VecF)((VecI)select(magnitude < 0.625f, small, large) | sign);
}
LATTE_INLINE VecD tanh(VecD x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// sigmoid(x), and sigmoid(-x) in `rest`, which 1 - sigmoid(x) would round away.
template <class T>
LATTE_INLINE Vec<T> sigmoid(Vec<T> x, Vec<T>& rest) {
  // exp(87) is still finite in float32.
  const Vec<T> e = exp(-max(splat(T(sizeof(T) == 4 ? -87 : -700)), x));
  const Vec<T> value = reciprocal(1 + e);
  rest = e * value;
  return value;
}

// An angle is n pi/2 + the rest, |rest| <= pi/4 = 0.79, for |angle| <= kMaxAngle: there n < 2^20,
// and n times the first 33 bits of pi/2 is exact, with or without fused multiply-add.
inline constexpr double kMaxAngle = 1.6e6;
// Adding 1.5 * 2^52 rounds to an integer and leaves it in the low bits.
inline constexpr double kToInteger = 0x1.8p52;
LATTE_INLINE VecD split_angle(VecD angle, VecD& n) {
  n = (angle * 0.636619772367581343 + kToInteger) - kToInteger;
  return (angle - n * 0x1.921fb544p0) - n * 0x1.0b4611a626331p-34;
}

// sin and cos of n pi/2 + rest from those of the rest. Odd n swap the two; bit 1 of n negates the
// sine, that of n + 1 the cosine.
template <class T, class VecI>
LATTE_INLINE Vec<T> turn_by_quadrants(VecI n, Vec<T> sine, Vec<T>& cosine) {
  constexpr int kToSign = sizeof(T) * 8 - 2;
  const VecI odd = -(n & 1), s = (VecI)sine, c = (VecI)cosine;
  cosine = (Vec<T>)(((c & ~odd) | (s & odd)) ^ (((n + 1) & 2) << kToSign));
  return (Vec<T>)(((s & ~odd) | (c & odd)) ^ ((n & 2) << kToSign));
}

// sin(x), and cos(x) in `cosine`, to 3e-16 by Taylor's polynomials of the rest; the library's
// functions beyond kMaxAngle.
LATTE_INLINE VecD sin_cos(VecD x, VecD& cosine) {
  if (any_greater(max(x, -x), splat(kMaxAngle))) {
    double s[kLanes<double>], c[kLanes<double>];
    for (int64_t i = 0; i < kLanes<double>; ++i) {
      s[i] = __builtin_sin(x[i]);
      c[i] = __builtin_cos(x[i]);
    }
    cosine = load(c);
    return load(s);
  }
  VecD n;
  const VecD r = split_angle(x, n), r2 = r * r;
  VecD s = -r2 * (1 / 1307674368000.0) + 1 / 6227020800.0;
  s = s * r2 - 1 / 39916800.0;
  s = s * r2 + 1 / 362880.0;
  s = s * r2 - 1 / 5040.0;
  s = s * r2 + 1 / 120.0;
  s = s * r2 - 1 / 6.0;
  s = s * r2 * r + r;
  VecD c = r2 * (1 / 20922789888000.0) - 1 / 87178291200.0;
  c = c * r2 + 1 / 479001600.0;
  c = c * r2 - 1 / 3628800.0;
  c = c * r2 + 1 / 40320.0;
  c = c * r2 - 1 / 720.0;
  c = c * r2 + 1 / 24.0;
  c = c * r2 - 0.5;
  cosine = c * r2 + 1.0;
  return turn_by_quadrants<double>((VectorOf<double>::integer)(n + kToInteger), s, cosine);
}

// The same in float, to 1e-7, of angles in double: `low`, then `high`. In half the time.
LATTE_INLINE VecF sin_cos(VecD low, VecD high, VecF& cosine) {
  const VecD largest = max(max(low, -low), max(high, -high));
  if (any_greater(largest, splat(kMaxAngle))) {
    VecD cosine_low, cosine_high;
    const VecD sine_low = sin_cos(low, cosine_low), sine_high = sin_cos(high, cosine_high);
    cosine = narrow(cosine_low, cosine_high);
    return narrow(sine_low, sine_high);
  }
  VecD n_low, n_high;
  const VecD r_low = split_angle(low, n_low), r_high = split_angle(high, n_high);
  const VecF r = narrow(r_low, r_high), r2 = r * r;
  VecF s = r2 * (1 / 362880.0f) - 1 / 5040.0f;
  s = s * r2 + 1 / 120.0f;
  s = s * r2 - 1 / 6.0f;
  s = s * r2 * r + r;
  VecF c = -r2 * (1 / 3628800.0f) + 1 / 40320.0f;
  c = c * r2 - 1 / 720.0f;
  c = c * r2 + 1 / 24.0f;
  c = c * r2 - 0.5f;
  cosine = c * r2 + 1.0f;
  const auto n = __builtin_convertvector(narrow(n_low, n_high), VectorOf<float>::integer);
  return turn_by_quadrants<float>(n, s, cosine);
}

#if LATTE_VECTOR_BYTES == 64
LATTE_INLINE VecF sqrt(VecF x) { return (VecF)_mm512_sqrt_ps((__m512)x); }
LATTE_INLINE VecD sqrt(VecD x) { return (VecD)_mm512_sqrt_pd((__m512d)x); }
#elif LATTE_VECTOR_BYTES == 32
LATTE_INLINE VecF sqrt(VecF x) { return (VecF)_mm256_sqrt_ps((__m256)x); }
LATTE_INLINE VecD sqrt(VecD x) { return (VecD)_mm256_sqrt_pd((__m256d)x); }
#elif defined(LATTE_SSE2)
LATTE_INLINE VecF sqrt(VecF x) { return (VecF)_mm_sqrt_ps((__m128)x); }
LATTE_INLINE VecD sqrt(VecD x) { return (VecD)_mm_sqrt_pd((__m128d)x); }
#elif defined(LATTE_NEON)
LATTE_INLINE VecF sqrt(VecF x) { return (VecF)vsqrtq_f32((float32x4_t)x); }
LATTE_INLINE VecD sqrt(VecD x) { return (VecD)vsqrtq_f64((float64x2_t)x); }
#else
template <class V>
LATTE_INLINE V sqrt(V x) {
  for (uint64_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
#endif

// Stores past the caches, for what nobody reads soon: a plain store first reads the memory that it
// is about to overwrite. p is aligned to a vector. stream_fence() orders them before later stores.
#if LATTE_VECTOR_BYTES == 64
LATTE_INLINE void stream(float* p, VecF x) { _mm512_stream_ps(p, (__m512)x); }
LATTE_INLINE void stream(double* p, VecD x) { _mm512_stream_pd(p, (__m512d)x); }
#elif LATTE_VECTOR_BYTES == 32
LATTE_INLINE void stream(float* p, VecF x) { _mm256_stream_ps(p, (__m256)x); }
LATTE_INLINE void stream(double* p, VecD x) { _mm256_stream_pd(p, (__m256d)x); }
#elif defined(LATTE_SSE2)
LATTE_INLINE void stream(float* p, VecF x) { _mm_stream_ps(p, (__m128)x); }
LATTE_INLINE void stream(double* p, VecD x) { _mm_stream_pd(p, (__m128d)x); }
#else
template <class T>
LATTE_INLINE void stream(T* p, Vec<T> x) {
  store(p, x);
}
#endif
LATTE_INLINE void stream_fence() {
#if defined(LATTE_SSE2)
  _mm_sfence();
#endif
}

template <int kLocality>
LATTE_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, kLocality);
}

// ---- conversion between storage and compute types -------------------------------------------

LATTE_INLINE float to_compute(float x) { return x; }
LATTE_INLINE double to_compute(double x) { return x; }
LATTE_INLINE float to_compute(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
LATTE_INLINE float to_compute(float16 x) {
  // Rebias the exponent. A subnormal is read as 2^-14 (1 + m) and loses its leading one again in a
  // normal subtraction, which works with subnormals flushed.
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7FFFu) << 13;
  uint32_t bits = magnitude + 0x38000000u;
  float y;
  if (magnitude >= 0x0F800000u) {
    bits = magnitude + 0x70000000u;
  } else if (magnitude < 0x00800000u) {
    bits += 0x00800000u;
    __builtin_memcpy(&y, &bits, 4);
    y -= 0x1p-14f;
    __builtin_memcpy(&bits, &y, 4);
  }
  bits |= sign;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
LATTE_INLINE void from_compute(float x, float* y) { *y = x; }
LATTE_INLINE void from_compute(double x, double* y) { *y = x; }
LATTE_INLINE void from_compute(float x, bfloat16* y) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  y->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u
                                      : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
LATTE_INLINE void from_compute(float x, float16* y) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
  } else if (magnitude >= 0x477FF000u) {  // rounds to 2^16 or above
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the float adder rounds to multiples of 2^-24
    float m;
    __builtin_memcpy(&m, &magnitude, 4);
    m += 0.5f;
    __builtin_memcpy(&half, &m, 4);
    half -= 0x3F000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  }
  y->bits = static_cast<uint16_t>(sign | half);
}

LATTE_INLINE VecF load_compute(const float* p) { return load(p); }
LATTE_INLINE VecD load_compute(const double* p) { return load(p); }
LATTE_INLINE void store_compute(float* p, VecF x) { store(p, x); }
LATTE_INLINE void store_compute(double* p, VecD x) { store(p, x); }

#if LATTE_VECTOR_BYTES == 64
LATTE_INLINE VecF load_compute(const bfloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
LATTE_INLINE VecF load_compute(const float16* p) {
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LATTE_INLINE void store_compute(bfloat16* p, VecF x) {
  const __m512i bits = (__m512i)x;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
LATTE_INLINE void store_compute(float16* p, VecF x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif LATTE_VECTOR_BYTES == 32
LATTE_INLINE VecF load_compute(const bfloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
LATTE_INLINE VecF load_compute(const float16* p) {
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LATTE_INLINE void store_compute(bfloat16* p, VecF x) {
  const __m256i bits = (__m256i)x;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i finite = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = (__m256i)_mm256_cmp_ps((__m256)x, (__m256)x, _CMP_UNORD_Q);
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(finite, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
LATTE_INLINE void store_compute(float16* p, VecF x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(LATTE_NEON)
LATTE_INLINE VecF load_compute(const bfloat16* p) {
  return (VecF)vshll_n_u16(vld1_u16(&p->bits), 16);
}
LATTE_INLINE VecF load_compute(const float16* p) {
  return (VecF)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
}
LATTE_INLINE void store_compute(bfloat16* p, VecF x) {
  const uint32x4_t bits = (uint32x4_t)x;
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t finite = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  const uint32x4_t number = vceqq_f32((float32x4_t)x, (float32x4_t)x);
  vst1_u16(&p->bits, vshrn_n_u32(vbslq_u32(number, finite, quiet), 16));
}
LATTE_INLINE void store_compute(float16* p, VecF x) {
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)));
}
#else
template <class S>
LATTE_INLINE VecF load_compute(const S* p) {
  VecF x;
  for (int64_t i = 0; i < kLanes<float>; ++i) x[i] = to_compute(p[i]);
  return x;
}
template <class S>
LATTE_INLINE void store_compute(S* p, VecF x) {
  for (int64_t i = 0; i < kLanes<float>; ++i) from_compute(x[i], p + i);
}
#endif

// The last, incomplete vector of a row: its first `count` elements, zero past them. Lane by lane
// the tails of 43-wide rows took a third of the time.
template <class S>
LATTE_INLINE auto load_compute_part(const S* p, int64_t count) {
  constexpr int64_t lanes = LATTE_VECTOR_BYTES / sizeof(to_compute(*p));
  S whole[lanes] = {};
  for (int64_t i = 0; i < lanes; ++i)
    if (i < count) whole[i] = p[i];
  return load_compute(whole);
}
template <class S, class V>
LATTE_INLINE void store_compute_part(S* p, int64_t count, V x) {
  constexpr int64_t lanes = sizeof(V) / sizeof(x[0]);
  S whole[lanes];
  store_compute(whole, x);
  for (int64_t i = 0; i < lanes; ++i)
    if (i < count) p[i] = whole[i];
}
// x in the first `count` lanes, `rest` in the others.
template <class V, class T>
LATTE_INLINE V first_lanes(int64_t count, V x, T rest) {
  for (int64_t i = 0; i < static_cast<int64_t>(sizeof(V) / sizeof(T)); ++i)
    if (i >= count) x[i] = rest;
  return x;
}
#if LATTE_VECTOR_BYTES == 64
LATTE_INLINE __mmask16 lane_mask(int64_t count) { return static_cast<__mmask16>((1 << count) - 1); }
LATTE_INLINE VecF load_compute_part(const float* p, int64_t count) {
  return (VecF)_mm512_maskz_loadu_ps(lane_mask(count), p);
}
LATTE_INLINE VecF load_compute_part(const bfloat16* p, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(lane_mask(count), p);
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
LATTE_INLINE VecF load_compute_part(const float16* p, int64_t count) {
  return (VecF)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lane_mask(count), p));
}
LATTE_INLINE void store_compute_part(float* p, int64_t count, VecF x) {
  _mm512_mask_storeu_ps(p, lane_mask(count), (__m512)x);
}
LATTE_INLINE VecF first_lanes(int64_t count, VecF x, float rest) {
  return (VecF)_mm512_mask_blend_ps(lane_mask(count), _mm512_set1_ps(rest), (__m512)x);
}
#elif LATTE_VECTOR_BYTES == 32
LATTE_INLINE __m256i lane_mask(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
LATTE_INLINE VecF load_compute_part(const float* p, int64_t count) {
  return (VecF)_mm256_maskload_ps(p, lane_mask(count));
}
LATTE_INLINE void store_compute_part(float* p, int64_t count, VecF x) {
  _mm256_maskstore_ps(p, lane_mask(count), (__m256)x);
}
LATTE_INLINE VecF first_lanes(int64_t count, VecF x, float rest) {
  return (VecF)_mm256_blendv_ps(_mm256_set1_ps(rest), (__m256)x, (__m256)lane_mask(count));
}
#endif

// Subnormal operands cost Intel cores a microcode assist per instruction; a weight below 1e-38 of
// its normaliser is zero for every purpose. Restores the caller's mode.
class FlushSubnormals {
 public:
#if defined(LATTE_SSE2)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned saved_;
#elif defined(LATTE_NEON)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  uint64_t saved_;
#else
  FlushSubnormals() {}  // no way to
#endif
};

}  // namespace latte::LATTE_ISA
