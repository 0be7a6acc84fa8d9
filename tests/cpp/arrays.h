// SPDX-License-Identifier: Apache-2.0
// Test tensors: any dtype, any memory layout, poisoned storage with guard zones.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "latte/latte.h"

namespace testing_latte {

using latte::DType;

// A value of an IEEE-like 16-bit format with that many exponent and mantissa bits.
struct HalfFormat {
  int exponent_bits, mantissa_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }

  double decode(uint16_t code) const {
    const int mantissa = code & ((1 << mantissa_bits) - 1);
    const int exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const double sign = code >> 15 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1)
      return mantissa ? std::numeric_limits<double>::quiet_NaN()
                      : sign * std::numeric_limits<double>::infinity();
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias() - mantissa_bits);
    return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias() - mantissa_bits);
  }

  // To nearest, ties to even.
  uint16_t encode(double x) const {
    const int sign = std::signbit(x) ? 1 << 15 : 0;
    const int infinity = ((1 << exponent_bits) - 1) << mantissa_bits;
    if (std::isnan(x)) return static_cast<uint16_t>(sign | infinity | 1 << (mantissa_bits - 1));
    x = std::fabs(x);
    if (std::isinf(x)) return static_cast<uint16_t>(sign | infinity);
    if (x == 0) return static_cast<uint16_t>(sign);
    // The code counts units in the last place from zero up, so a carry just moves to the next one.
    const int exponent = std::max(std::ilogb(x), 1 - bias());
    const double units = std::nearbyint(std::ldexp(x, mantissa_bits - exponent));
    const int code = ((exponent + bias() - 1) << mantissa_bits) + static_cast<int>(units);
    return static_cast<uint16_t>(sign | std::min(code, infinity));
  }
};

constexpr HalfFormat kBfloat16{8, 7}, kFloat16{5, 10};

inline int64_t element_size(DType dtype) {
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

inline double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 0x1p-53;
    case DType::float32:
      return 0x1p-24;
    case DType::bfloat16:
      return 0x1p-8;
    default:
      return 0x1p-11;
  }
}

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return "float64";
    case DType::float32:
      return "float32";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
    default:
      return "other";
  }
}

enum class Layout {
  contiguous,
  misaligned,        // starts one element after a 64-byte border
  transposed,        // dimensions rank - 3 and rank - 2 swapped in memory: (B,T,H,C) storage
  columns,           // the last two dimensions swapped in memory
  reversed,          // every stride negative
  gapped,            // last stride 2, three more elements between rows
  expanded_batch,    // stride 0 in the first dimension
  expanded_tokens,   // stride 0 in the last but one
  expanded_channels  // stride 0 in the last
};

inline bool is_expanded(Layout layout) { return layout >= Layout::expanded_batch; }

// Storage of a tensor, all bytes 0xFF (NaN in every floating-point type) until set.
class Array {
 public:
  Array() = default;
  Array(DType dtype, std::vector<int64_t> shape, Layout layout = Layout::contiguous) {
    const int rank = static_cast<int>(shape.size());
    tensor_.dtype = dtype;
    tensor_.rank = rank;
    std::vector<int> order;  // outermost first
    for (int i = 0; i < rank; ++i) order.push_back(i);
    if (layout == Layout::transposed && rank >= 3) std::swap(order[rank - 3], order[rank - 2]);
    if (layout == Layout::columns && rank >= 2) std::swap(order[rank - 2], order[rank - 1]);
    int64_t stride = layout == Layout::gapped ? 2 : 1, last = 0;
    for (int j = rank - 1; j >= 0; --j) {
      const int i = order[j];
      tensor_.shape[i] = shape[i];
      size_ *= shape[i];
      const bool same = (layout == Layout::expanded_batch && i == 0) ||
                        (layout == Layout::expanded_tokens && i == rank - 2) ||
                        (layout == Layout::expanded_channels && i == rank - 1);
      tensor_.stride[i] = same ? 0 : stride;
      if (same || shape[i] == 0) continue;
      last += (shape[i] - 1) * stride;
      stride *= shape[i];
      if (layout == Layout::gapped && j == rank - 1) stride += 3;
    }
    int64_t first = layout == Layout::misaligned ? 1 : 0;
    last += first;
    if (layout == Layout::reversed) {
      first = last;
      for (int i = 0; i < rank; ++i) tensor_.stride[i] = -tensor_.stride[i];
    }
    const int64_t bytes = element_size(dtype);
    storage_bytes_ = 2 * kGuard + (last + 1) * bytes;
    allocation_ = std::make_unique<unsigned char[]>(storage_bytes_ + 64);
    const auto address = reinterpret_cast<uintptr_t>(allocation_.get());
    storage_ = allocation_.get() + (64 - address % 64) % 64;
    tensor_.data = storage_ + kGuard + first * bytes;
    poison();
  }

  // Of the same type and shape, poisoned.
  Array like() const { return Array(tensor_.dtype, {tensor_.shape, tensor_.shape + tensor_.rank}); }

  // An absent array, unlike an empty one, gives the "absent" tensor.
  const latte::Tensor& tensor() const { return tensor_; }
  bool present() const { return storage_ != nullptr; }
  DType dtype() const { return tensor_.dtype; }
  int64_t size() const { return present() ? size_ : 0; }
  void poison() { std::memset(storage_, 0xFF, storage_bytes_); }

  // Element i in row-major order of the shape.
  double get(int64_t i) const {
    const unsigned char* p = element(i);
    switch (tensor_.dtype) {
      case DType::float64:
        return load<double>(p);
      case DType::float32:
        return load<float>(p);
      case DType::bfloat16:
        return kBfloat16.decode(load<uint16_t>(p));
      case DType::float16:
        return kFloat16.decode(load<uint16_t>(p));
      case DType::int32:
        return load<int32_t>(p);
      case DType::int64:
        return static_cast<double>(load<int64_t>(p));
      default:
        return *p;
    }
  }
  void set(int64_t i, double x) {
    unsigned char* p = element(i);
    switch (tensor_.dtype) {
      case DType::float64:
        return save(p, x);
      case DType::float32:
        return save(p, static_cast<float>(x));
      case DType::bfloat16:
        return save(p, kBfloat16.encode(x));
      case DType::float16:
        return save(p, kFloat16.encode(x));
      case DType::int32:
        return save(p, static_cast<int32_t>(x));
      case DType::int64:
        return save(p, static_cast<int64_t>(x));
      default:
        *p = x != 0;
    }
  }

  std::vector<double> values() const {
    std::vector<double> all(size());
    for (int64_t i = 0; i < size(); ++i) all[i] = get(i);
    return all;
  }
  // The bytes of the elements in row-major order.
  std::vector<unsigned char> bytes() const {
    std::vector<unsigned char> all;
    for (int64_t i = 0; i < size(); ++i)
      all.insert(all.end(), element(i), element(i) + element_size(tensor_.dtype));
    return all;
  }
  void copy_from(const Array& other) {
    for (int64_t i = 0; i < size(); ++i) set(i, other.get(i));
  }

  // True if the guard zones and the gaps between elements still hold the poison.
  bool intact() const {
    if (!present()) return true;
    std::vector<bool> owned(storage_bytes_);
    for (int64_t i = 0; i < size_; ++i)
      for (int64_t b = 0; b < element_size(tensor_.dtype); ++b)
        owned[element(i) + b - storage_] = true;
    for (int64_t i = 0; i < storage_bytes_; ++i)
      if (!owned[i] && storage_[i] != 0xFF) return false;
    return true;
  }

 private:
  static constexpr int64_t kGuard = 256;

  template <class T>
  static T load(const unsigned char* p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  template <class T>
  static void save(unsigned char* p, T x) {
    std::memcpy(p, &x, sizeof x);
  }
  unsigned char* element(int64_t i) const {
    int64_t at = 0;
    for (int64_t axis = tensor_.rank - 1; axis >= 0; --axis) {
      at += i % tensor_.shape[axis] * tensor_.stride[axis];
      i /= tensor_.shape[axis];
    }
    return static_cast<unsigned char*>(tensor_.data) + at * element_size(tensor_.dtype);
  }

  latte::Tensor tensor_;
  int64_t size_ = 1, storage_bytes_ = 0;
  std::unique_ptr<unsigned char[]> allocation_;
  unsigned char* storage_ = nullptr;
};

struct StateArrays {
  Array max, norm, mean;

  StateArrays() = default;
  StateArrays(DType dtype, int64_t n, int64_t heads, int64_t latents, int64_t dim,
              Layout layout = Layout::contiguous, bool with_max = true)
      : norm(dtype, {n, heads, latents}, layout), mean(dtype, {n, heads, latents, dim}, layout) {
    if (with_max) max = Array(dtype, {n, heads, latents}, layout);
  }
  latte::State state() const { return {max.tensor(), norm.tensor(), mean.tensor()}; }
  bool present() const { return norm.present(); }
  void copy_from(const StateArrays& other) {
    max.copy_from(other.max);
    norm.copy_from(other.norm);
    mean.copy_from(other.mean);
  }
  bool intact() const { return max.intact() && norm.intact() && mean.intact(); }
};

}  // namespace testing_latte
