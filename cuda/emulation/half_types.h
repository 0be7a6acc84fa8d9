// SPDX-License-Identifier: Apache-2.0
// The 16-bit types of cuda_bf16.h and cuda_fp16.h: storage and conversions, no arithmetic, since
// kernels compute in float32. Rounding is to nearest even as on the device.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/emulation/vector_types.h"

struct __nv_bfloat16 {
  uint16_t code;
};
struct __half {
  uint16_t code;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.code; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t code) { return {code}; }
inline uint16_t __half_as_ushort(__half x) { return x.code; }
inline __half __ushort_as_half(uint16_t code) { return {code}; }

inline float __bfloat162float(__nv_bfloat16 x) {
  return std::bit_cast<float>(uint32_t{x.code} << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};  // the device's one NaN
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t{x.code} >> 15 << 31, magnitude = x.code & 0x7fff;
  if (magnitude < 0x0400)  // zero and subnormal numbers, in units of 2^-24
    return std::bit_cast<float>(sign |
                                std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
  const uint32_t rebias = magnitude >= 0x7c00 ? 0x70000000 : 0x38000000;
  return std::bit_cast<float>(sign | ((magnitude << 13) + rebias));
}

inline __half __float2half_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t code;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000)  // 65520, half way between the largest number and the next
    code = 0x7c00;
  else if (magnitude <
           0x38800000)  // below 2^-14; 0.5f has the unit in the last place of the result
    code = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  else
    code = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  return {static_cast<uint16_t>(sign | code)};
}

inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {__bfloat162float(v.x), __bfloat162float(v.y)};
}
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
