// SPDX-License-Identifier: Apache-2.0
// CUDA's language and built-in functions for a host compiler, so that the text of a kernel runs on
// the CPU under test. For tests only. Instead of cuda_runtime.h, cuda_bf16.h and cuda_fp16.h.
//
// Not emulated: static __shared__ (it could be neither poisoned nor bounded), flushing of
// subnormals (-ftz), the error of approximate functions, bank conflicts of plain accesses, timing.
#pragma once

#include <math.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/emulation/half_types.h"
#include "cuda/emulation/runtime.h"
#include "cuda/emulation/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __grid_constant__

typedef struct CUstream_st* cudaStream_t;

extern constinit thread_local uint3 threadIdx;
extern constinit thread_local uint3 blockIdx;
extern constinit thread_local dim3 blockDim;
extern constinit thread_local dim3 gridDim;
constexpr int warpSize = 32;

// ---- barriers and fences ----

inline void __syncthreads(latte::emulation::CallSite site = latte::emulation::CallSite::current()) {
  latte::emulation::block_barrier(latte::emulation::Vote::none, false, site);
}
inline int __syncthreads_or(
    int predicate, latte::emulation::CallSite site = latte::emulation::CallSite::current()) {
  return latte::emulation::block_barrier(latte::emulation::Vote::any, predicate, site);
}
inline int __syncthreads_and(
    int predicate, latte::emulation::CallSite site = latte::emulation::CallSite::current()) {
  return latte::emulation::block_barrier(latte::emulation::Vote::all, predicate, site);
}
inline int __syncthreads_count(
    int predicate, latte::emulation::CallSite site = latte::emulation::CallSite::current()) {
  return latte::emulation::block_barrier(latte::emulation::Vote::count, predicate, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       latte::emulation::CallSite site = latte::emulation::CallSite::current()) {
  latte::emulation::warp_barrier(mask, site);
}
inline void __threadfence() { latte::emulation::memory_fence(); }
inline void __threadfence_block() { latte::emulation::memory_fence(); }

// ---- warp collectives ----

namespace latte::emulation {

template <class T>
T shuffle_value(Shuffle mode, unsigned mask, T value, int argument, int width, CallSite site) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mode, mask, bits, argument, width, site);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace latte::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize,
              latte::emulation::CallSite site = latte::emulation::CallSite::current()) {
  return shuffle_value(latte::emulation::Shuffle::index, mask, value, lane, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 latte::emulation::CallSite site = latte::emulation::CallSite::current()) {
  return shuffle_value(latte::emulation::Shuffle::up, mask, value, static_cast<int>(delta), width,
                       site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   latte::emulation::CallSite site = latte::emulation::CallSite::current()) {
  return shuffle_value(latte::emulation::Shuffle::down, mask, value, static_cast<int>(delta), width,
                       site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize,
                  latte::emulation::CallSite site = latte::emulation::CallSite::current()) {
  return shuffle_value(latte::emulation::Shuffle::exclusive_or, mask, value, lanes, width, site);
}
inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    latte::emulation::CallSite site = latte::emulation::CallSite::current()) {
  return latte::emulation::ballot(mask, predicate, site);
}
inline int __any_sync(unsigned mask, int predicate,
                      latte::emulation::CallSite site = latte::emulation::CallSite::current()) {
  return latte::emulation::ballot(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      latte::emulation::CallSite site = latte::emulation::CallSite::current()) {
  return latte::emulation::ballot(mask, !predicate, site) == 0;
}

// ---- memory ----

template <class T>
T __ldg(const T* address) {
  latte::emulation::count_load(sizeof(T));
  return *address;
}

// Relaxed, as on the device: an atomic orders no other access, and TSan knows it.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*address).exchange(value, std::memory_order_relaxed);
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  std::atomic_ref<T> target(*address);
  T seen = target.load(std::memory_order_relaxed);
  while (seen < value && !target.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
  return seen;
}

// ---- arithmetic ----

// Of two floating-point numbers the one that is a number, as fminf and fmaxf.
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
