// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, like kernels.cpp.
#include "simd_probe.h"

#include "cpu/simd.h"

namespace latte::LATTE_ISA {
namespace {

template <class F>
void for_each_vector(int64_t n, F f) {
  for (int64_t i = 0; i < n; i += kLanes<float>) f(i);
}

template <class S>
void load_all(const uint16_t* x, float* y, int64_t n, bool vectors) {
  const FlushSubnormals flush;
  const S* source = reinterpret_cast<const S*>(x);
  if (vectors) {
    for_each_vector(n, [&](int64_t i) { store(y + i, load_compute(source + i)); });
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = to_compute(source[i]);
  }
}

template <class S>
void store_all(const float* x, uint16_t* y, int64_t n, bool vectors) {
  const FlushSubnormals flush;
  S* target = reinterpret_cast<S*>(y);
  if (vectors) {
    for_each_vector(n, [&](int64_t i) { store_compute(target + i, load(x + i)); });
  } else {
    for (int64_t i = 0; i < n; ++i) from_compute(x[i], target + i);
  }
}

void exp_all(const float* x, float* y, int64_t n) {
  const FlushSubnormals flush;
  for_each_vector(n, [&](int64_t i) { store(y + i, exp(load(x + i))); });
}

template <class T>
void tanh_all(const T* x, T* y, int64_t n) {
  const FlushSubnormals flush;
  for (int64_t i = 0; i < n; i += kLanes<T>) store(y + i, tanh(load(x + i)));
}

void reciprocal_all(const float* x, float* y, int64_t n) {
  for_each_vector(n, [&](int64_t i) { store(y + i, reciprocal(load(x + i))); });
}

void max_all(const float* a, const float* b, float* y, int64_t n) {
  for_each_vector(n, [&](int64_t i) { store(y + i, max(load(a + i), load(b + i))); });
}

bool any_greater_of(const float* a, const float* b) { return any_greater(load(a), load(b)); }

}  // namespace

const testing_latte::SimdProbe& probe() {
  static constexpr testing_latte::SimdProbe kProbe = {
      exp_all,
      tanh_all<float>,
      tanh_all<double>,
      reciprocal_all,
      max_all,
      any_greater_of,
      kLanes<float>,
      load_all<float16>,
      load_all<bfloat16>,
      store_all<float16>,
      store_all<bfloat16>,
  };
  return kProbe;
}

}  // namespace latte::LATTE_ISA
