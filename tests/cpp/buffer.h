// SPDX-License-Identifier: Apache-2.0
// Tensors for the tests: any dtype, any layout, and memory that notices a stray access. Every byte
// that is not an element, and every element not written yet, is 0xFF, which reads as NaN: a stray
// read poisons a result, a stray write is found by outside_is_untouched().
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "latte/latte.h"

namespace latte_test {

using latte::DType;

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
    case DType::boolean:
      return "bool";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
  }
  return "unknown";
}

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64:
      return 8;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::boolean:
      return 1;
    default:
      return 2;
  }
}

// ---- numbers and their bits, independently of the library --------------------------------------

// x to the nearest number (ties to even) with `digits` bits and exponents of frexp >= min_exponent.
inline double round_to(double x, int digits, int min_exponent, double largest) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent;
  std::frexp(x, &exponent);
  const double step = std::ldexp(1.0, std::max(exponent, min_exponent) - digits);
  const double y = std::nearbyint(x / step) * step;
  return std::fabs(y) > largest ? std::copysign(INFINITY, x) : y;
}

inline double quantise(double x, DType dtype) {
  switch (dtype) {
    case DType::float32:
      return static_cast<float>(x);
    case DType::bfloat16:
      return round_to(x, 8, -125, 0x1.FEp127);
    case DType::float16:
      return round_to(x, 11, -13, 65504);
    default:
      return x;
  }
}

// Half a unit in the last place of 1, relative and (for subnormal numbers) absolute.
inline double storage_error(DType dtype, double x) {
  switch (dtype) {
    case DType::bfloat16:
      return 0x1p-8 * std::fabs(x) + 0x1p-126;
    case DType::float16:
      return 0x1p-11 * std::fabs(x) + 0x1p-25;
    case DType::float32:
      return 0x1p-24 * std::fabs(x) + 0x1p-126;
    default:
      return 0x1p-53 * std::fabs(x);
  }
}

inline double float16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return exponent ? sign * std::ldexp(1024 + fraction, exponent - 25)
                  : sign * std::ldexp(fraction, -24);
}
inline uint16_t float16_bits(double x) {
  x = quantise(x, DType::float16);
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (std::isnan(x)) return 0x7E00;
  if (std::isinf(x)) return sign | 0x7C00;
  if (x < 0x1p-14) return sign | static_cast<uint16_t>(x * 0x1p24);
  int exponent;
  const double fraction = std::frexp(x, &exponent);  // in [1/2, 1)
  return sign | static_cast<uint16_t>((exponent + 14) * 1024 + (fraction * 2 - 1) * 1024);
}
inline double bfloat16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
inline uint16_t bfloat16_bits(double x) {
  const auto narrow = static_cast<float>(quantise(x, DType::bfloat16));
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  return static_cast<uint16_t>(std::isnan(narrow) ? 0x7FC0 : bits >> 16);
}

// ---- layouts -----------------------------------------------------------------------------------

enum class Layout {
  contiguous,
  swapped,   // dimensions 1 and 2 exchanged in memory, as in (B,T,H,C)
  outer,     // the last dimension is the slowest
  reversed,  // every stride negative
  gaps,      // every other element, and padded rows
  odd,       // contiguous, but one element off any alignment
};
inline constexpr Layout kLayouts[] = {Layout::contiguous, Layout::swapped, Layout::outer,
                                      Layout::reversed,   Layout::gaps,    Layout::odd};
inline const char* name(Layout layout) {
  constexpr const char* names[] = {"contiguous", "swapped", "outer", "reversed", "gaps", "odd"};
  return names[static_cast<int>(layout)];
}

class Buffer {
 public:
  Buffer() = default;
  // `expanded` is a set of dimensions (bit i) that get stride 0.
  Buffer(DType dtype, std::vector<int64_t> shape, Layout layout = Layout::contiguous,
         unsigned expanded = 0)
      : dtype_(dtype), shape_(std::move(shape)) {
    const int rank = static_cast<int>(shape_.size());
    std::vector<int> order(rank);  // slowest dimension first
    for (int i = 0; i < rank; ++i) order[i] = layout == Layout::outer ? rank - 1 - i : i;
    if (layout == Layout::swapped && rank >= 3) std::swap(order[rank - 3], order[rank - 2]);
    const int64_t gap = layout == Layout::gaps ? 1 : 0;
    strides_.assign(rank, 0);
    int64_t extent = 1 + gap;
    for (int i = rank - 1; i >= 0; --i) {
      if (expanded >> order[i] & 1) continue;
      strides_[order[i]] = extent;
      extent *= shape_[order[i]] + gap;
    }
    for (const int64_t n : shape_) count_ *= n;
    if (count_ == 0) extent = 1;
    if (layout == Layout::reversed && count_ > 0) {
      for (int i = 0; i < rank; ++i) {
        origin_ += (shape_[i] - 1) * strides_[i];
        strides_[i] = -strides_[i];
      }
    }
    const int64_t lead = kGuard + (layout == Layout::odd ? size_of(dtype) : 0);
    bytes_.assign(lead + extent * size_of(dtype) + kGuard, 0xFF);
    base_ = lead;
    element_.assign(bytes_.size(), 0);
    for (int64_t i = 0; i < count_; ++i) std::memset(&element_[position(i)], 1, size_of(dtype_));
  }

  latte::Tensor tensor() {
    latte::Tensor t;
    t.data = &bytes_[base_ + origin_ * size_of(dtype_)];
    t.dtype = dtype_;
    t.rank = static_cast<int64_t>(shape_.size());
    for (int64_t i = 0; i < t.rank; ++i) {
      t.shape[i] = shape_[i];
      t.stride[i] = strides_[i];
    }
    return t;
  }

  template <class Values>
  void fill(const Values& values) {
    for (int64_t i = 0; i < count_; ++i) set(i, static_cast<double>(values[i]));
    filled_ = bytes_;
  }
  void set(int64_t i, double x) {
    unsigned char* at = &bytes_[position(i)];
    switch (dtype_) {
      case DType::float64:
        return put(at, x);
      case DType::float32:
        return put(at, static_cast<float>(x));
      case DType::bfloat16:
        return put(at, bfloat16_bits(x));
      case DType::float16:
        return put(at, float16_bits(x));
      case DType::boolean:
        return put(at, x != 0);
      case DType::int32:
        return put(at, static_cast<int32_t>(x));
      case DType::int64:
        return put(at, static_cast<int64_t>(x));
    }
  }
  double get(int64_t i) const {
    const unsigned char* at = &bytes_[position(i)];
    switch (dtype_) {
      case DType::float64:
        return take<double>(at);
      case DType::float32:
        return take<float>(at);
      case DType::bfloat16:
        return bfloat16_value(take<uint16_t>(at));
      case DType::float16:
        return float16_value(take<uint16_t>(at));
      case DType::boolean:
        return take<bool>(at);
      case DType::int32:
        return take<int32_t>(at);
      case DType::int64:
        return static_cast<double>(take<int64_t>(at));
    }
    return NAN;
  }
  std::vector<double> values() const {
    std::vector<double> out(count_);
    for (int64_t i = 0; i < count_; ++i) out[i] = get(i);
    return out;
  }
  int64_t count() const { return count_; }
  DType dtype() const { return dtype_; }

  bool outside_is_untouched() const {
    for (size_t i = 0; i < bytes_.size(); ++i)
      if (!element_[i] && bytes_[i] != 0xFF) return false;
    return true;
  }
  bool is_as_filled() const { return bytes_ == filled_; }

 private:
  // Under AddressSanitizer the tensor ends where its allocation ends.
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGuard = 0;
#else
  static constexpr int64_t kGuard = 256;
#endif

  int64_t position(int64_t i) const {
    int64_t offset = origin_;
    for (size_t d = shape_.size(); d-- > 0; i /= shape_[d]) offset += i % shape_[d] * strides_[d];
    return base_ + offset * size_of(dtype_);
  }
  template <class T>
  static void put(unsigned char* at, T x) {
    std::memcpy(at, &x, sizeof(T));
  }
  template <class T>
  static T take(const unsigned char* at) {
    T x;
    std::memcpy(&x, at, sizeof(T));
    return x;
  }

  DType dtype_ = DType::float32;
  std::vector<int64_t> shape_, strides_;
  int64_t count_ = 1, origin_ = 0, base_ = 0;
  std::vector<unsigned char> bytes_, filled_;
  std::vector<char> element_;
};

// A workspace of exactly the bytes asked for, `misalignment` bytes off a 64-byte border, full of
// NaN, with a guard zone on both sides.
class Workspace {
 public:
  explicit Workspace(int64_t bytes, int64_t misalignment = 0) : bytes_(bytes) {
    memory_.assign(kGuard + 128 + bytes + kGuard, 0xFF);
    const auto address = reinterpret_cast<uintptr_t>(memory_.data()) + kGuard;
    begin_ = kGuard + static_cast<int64_t>((64 - address % 64) % 64) + misalignment % 64;
  }
  void* data() { return memory_.data() + begin_; }
  bool outside_is_untouched() const {
    for (int64_t i = 0; i < static_cast<int64_t>(memory_.size()); ++i)
      if ((i < begin_ || i >= begin_ + bytes_) && memory_[i] != 0xFF) return false;
    return true;
  }

 private:
  static constexpr int64_t kGuard = 4096;
  int64_t bytes_, begin_ = 0;
  std::vector<unsigned char> memory_;
};

}  // namespace latte_test
