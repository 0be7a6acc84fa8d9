// SPDX-License-Identifier: Apache-2.0
// Tensors with channels last, (B,T,C) or (N,C), as recurrences and convolutions walk them: a thread
// per channel, so that a warp reads neighbouring channels of a token. Absent tensors read as zero.
#pragma once

#include "common/validate.h"
#include "cuda/element.h"
#include "cuda/heuristics.h"

namespace latte::cuda {

struct Rows {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride_b = 0, stride_t = 0, stride_c = 0;
};

// Of a (B,T,C) tensor, or an (N,C) tensor as a row of each sequence.
inline Rows rows_of(const Tensor& t) {
  if (!present(t)) return {};
  if (t.rank == 2) return {t.data, t.dtype, t.stride[0], 0, t.stride[1]};
  return {t.data, t.dtype, t.stride[0], t.stride[1], t.stride[2]};
}
// A (C,) tensor as one row, a (C,K) tensor as K rows.
inline Rows parameter_of(const Tensor& t) {
  if (!present(t)) return {};
  return {t.data, t.dtype, 0, t.rank == 2 ? t.stride[1] : 0, t.stride[0]};
}

template <class T>
__device__ __forceinline__ T read(const Rows& rows, int64_t b, int64_t t, int64_t c) {
  T value = 0;
  if (rows.data)
    with_storage_type<T>(rows.dtype, [&](auto type) {
      using S = typename decltype(type)::type;
      const int64_t at = b * rows.stride_b + t * rows.stride_t + c * rows.stride_c;
      value = to_compute(global_load(static_cast<const S*>(rows.data) + at));
    });
  return value;
}
template <class T>
__device__ __forceinline__ void write(const Rows& rows, int64_t b, int64_t t, int64_t c, T value) {
  if (rows.data)
    with_storage_type<T>(rows.dtype, [&](auto type) {
      using S = typename decltype(type)::type;
      const int64_t at = b * rows.stride_b + t * rows.stride_t + c * rows.stride_c;
      global_store(static_cast<S*>(rows.data) + at, from_compute<S>(value));
    });
}

// Where the tokens of a sequence lie in a (B,T,C) tensor.
struct Range {
  int64_t batch = 0, first = 0, tokens = 0;
};

class Sequences {
 public:
  Sequences() = default;
  Sequences(const Tensor& cu_seqlens, int64_t count, int64_t tokens)
      : count_(count), tokens_(tokens) {
    if (!present(cu_seqlens)) return;
    borders_ = cu_seqlens.data;
    stride_ = cu_seqlens.stride[0];
    is_wide_ = cu_seqlens.dtype == DType::int64;
  }
  __device__ __forceinline__ int64_t count() const { return count_; }
  __device__ __forceinline__ bool is_packed() const { return borders_ != nullptr; }

  // Whatever the borders are, it lies inside of the tensor: nobody has checked them.
  __device__ __forceinline__ Range range(int64_t n) const {
    if (!borders_) return {n, 0, tokens_};
    const int64_t first = border(n), end = border(n + 1);
    return {0, first, end > first ? end - first : 0};
  }
  // The last sequence that starts at or before the token; the batch if they are not packed.
  __device__ __forceinline__ int64_t find(int64_t batch, int64_t token) const {
    if (!borders_) return batch;
    int64_t low = 0, high = count_;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (border(middle) <= token ? low : high) = middle;
    }
    return low;
  }
  // The first sequence of another batch.
  __device__ __forceinline__ int64_t end(int64_t batch) const {
    return borders_ ? count_ : batch + 1;
  }

 private:
  __device__ __forceinline__ int64_t border(int64_t n) const {
    const int64_t at = n * stride_;
    const int64_t value = is_wide_ ? static_cast<const int64_t*>(borders_)[at]
                                   : static_cast<const int32_t*>(borders_)[at];
    return value < 0 ? 0 : value > tokens_ ? tokens_ : value;
  }

  const void* borders_ = nullptr;
  int64_t count_ = 0, tokens_ = 0, stride_ = 0;
  bool is_wide_ = false;
};

// A channel of a sequence; `turned`: from the last token to the first.
template <class T>
class Column {
 public:
  __device__ __forceinline__ Column(const Rows& rows, const Range& range, int64_t c,
                                    bool turned = false)
      : data_(rows.data),
        dtype_(rows.dtype),
        step_(turned ? -rows.stride_t : rows.stride_t),
        first_(range.batch * rows.stride_b + c * rows.stride_c +
               (range.first + (turned ? range.tokens - 1 : 0)) * rows.stride_t) {}

  // Tokens t, .., t + kCount - 1; those before t + from or from t + count on read as zero.
  template <int kCount>
  __device__ __forceinline__ void load(int64_t t, int64_t count, T (&out)[kCount],
                                       int64_t from = 0) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = 0;
    if (count <= 0 || from >= kCount || !data_) return;
    with_storage_type<T>(dtype_, [&](auto type) {
      using S = typename decltype(type)::type;
      const S* const p = static_cast<const S*>(data_) + first_ + t * step_;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (i >= from && i < count) out[i] = to_compute(global_load(p + i * step_));
    });
  }
  __device__ __forceinline__ void store(int64_t t, int64_t count, const T (&in)[kTile<T>]) const {
    with_storage_type<T>(dtype_, [&](auto type) {
      using S = typename decltype(type)::type;
      S* const p = static_cast<S*>(data_) + first_ + t * step_;
#pragma unroll
      for (int i = 0; i < kTile<T>; ++i)
        if (i < count) global_store(p + i * step_, from_compute<S>(in[i]));
    });
  }

 private:
  void* data_;
  DType dtype_;
  int64_t step_, first_;
};

}  // namespace latte::cuda
