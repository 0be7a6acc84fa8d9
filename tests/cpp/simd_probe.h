// SPDX-License-Identifier: Apache-2.0
// simd.h of one instruction set, reachable from a test that any machine can start.
#pragma once

#include <cstdint>

namespace testing_latte {

// Arrays hold a multiple of 16 elements; the halves are bit patterns.
struct SimdProbe {
  void (*exp)(const float* x, float* y, int64_t n);
  void (*tanh)(const float* x, float* y, int64_t n);
  void (*tanh_double)(const double* x, double* y, int64_t n);
  void (*reciprocal)(const float* x, float* y, int64_t n);
  void (*max)(const float* a, const float* b, float* y, int64_t n);
  bool (*any_greater)(const float* a, const float* b);  // of the first lanes() elements
  int64_t lanes;
  void (*load_float16)(const uint16_t* x, float* y, int64_t n, bool vectors);
  void (*load_bfloat16)(const uint16_t* x, float* y, int64_t n, bool vectors);
  void (*store_float16)(const float* x, uint16_t* y, int64_t n, bool vectors);
  void (*store_bfloat16)(const float* x, uint16_t* y, int64_t n, bool vectors);
};

}  // namespace testing_latte
