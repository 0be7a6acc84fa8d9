// SPDX-License-Identifier: Apache-2.0
// Element types in memory, the type they are computed in, and whole vectors of them.
#pragma once

#include <type_traits>

#include "cuda/device.h"
#include "latte/latte.h"

namespace latte::cuda {

template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

__device__ __forceinline__ float to_compute(float x) { return x; }
__device__ __forceinline__ double to_compute(double x) { return x; }
__device__ __forceinline__ float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_compute(__half x) { return __half2float(x); }

template <class S>
__device__ __forceinline__ S from_compute(Compute<S> x) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<S, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

// N neighbours in memory, moved by one instruction if they fill 2, 4, 8 or 16 bytes.
template <class S, int N>
struct alignas(sizeof(S) * N) Vector {
  S values[N];
};
inline constexpr int kVectorBytes = 16;

template <int N, class S>
__device__ __forceinline__ void load_vector(const S* p, Compute<S> (&out)[N]) {
  const Vector<S, N> vector = global_load(reinterpret_cast<const Vector<S, N>*>(p));
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_compute(vector.values[i]);
}
template <int N, class S>
__device__ __forceinline__ void store_vector(S* p, const Compute<S> (&in)[N]) {
  Vector<S, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) vector.values[i] = from_compute<S>(in[i]);
  global_store(reinterpret_cast<Vector<S, N>*>(p), vector);
}

template <class S>
struct Type {
  using type = S;
};

template <class E>
inline constexpr DType kDType = std::is_same_v<E, __nv_bfloat16> ? DType::bfloat16
                                : std::is_same_v<E, __half>      ? DType::float16
                                : std::is_same_v<E, float>       ? DType::float32
                                                                 : DType::float64;

// Calls f(Type<S>()) on the host, S the type of a dtype's elements.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float64:
      return f(Type<double>());
    case DType::bfloat16:
      return f(Type<__nv_bfloat16>());
    case DType::float16:
      return f(Type<__half>());
    default:
      return f(Type<float>());
  }
}
template <class F>
void with_compute_type(bool is_double, F f) {
  is_double ? f(Type<double>()) : f(Type<float>());
}

// The same in a kernel that computes in T, where float64 has no other company. One uniform branch,
// which a kernel pays once for many elements: a mixture of types then needs no kernel of its own.
template <class T, class F>
__device__ __forceinline__ void with_storage_type(DType dtype, F f) {
  if constexpr (std::is_same_v<T, double>) {
    f(Type<double>());
  } else if (dtype == DType::bfloat16) {
    f(Type<__nv_bfloat16>());
  } else if (dtype == DType::float16) {
    f(Type<__half>());
  } else {
    f(Type<float>());
  }
}

}  // namespace latte::cuda
