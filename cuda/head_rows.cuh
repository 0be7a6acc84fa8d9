// SPDX-License-Identifier: Apache-2.0
// Tensors (B,heads,T,C) as the kernels of attention walk them: rows of one head.
#pragma once

#include "cuda/call.h"
#include "cuda/element.h"

namespace latte::cuda {

struct HeadRows {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride_b = 0, stride_h = 0, stride_t = 0, stride_c = 0;
  // 16 bytes at a time from an input in the kernel's type, 8 to an output; else one element.
  bool vectors = false;
  int64_t stride_partial = 0;  // between partial sums of the same element

  __device__ __forceinline__ int64_t at(int64_t b, int64_t h, int64_t t, int64_t c) const {
    return b * stride_b + h * stride_h + t * stride_t + c * stride_c;
  }
};

// Absent tensors give rows without data; those of rank 3 are one row of every head.
inline HeadRows head_rows(const Tensor& t, bool vectors = false) {
  if (!present(t)) return {};
  if (t.rank == 3) return {t.data, t.dtype, t.stride[0], t.stride[1], 0, t.stride[2], vectors};
  return {t.data, t.dtype, t.stride[0], t.stride[1], t.stride[2], t.stride[3], vectors};
}
inline HeadRows input_rows(const Tensor& t, DType kernel_type) {
  return head_rows(t, present(t) && t.dtype == kernel_type && aligned(t, 16) &&
                          t.shape[t.rank - 1] * element_size(t.dtype) % 16 == 0);
}
inline HeadRows output_rows(const Tensor& t) {
  return head_rows(t, present(t) && aligned(t, 8) && t.shape[t.rank - 1] % 4 == 0);
}

template <class T>
__device__ __forceinline__ T read(const HeadRows& rows, int64_t b, int64_t h, int64_t t,
                                  int64_t c) {
  T value = 0;
  with_storage_type<T>(rows.dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    value = to_compute(global_load(static_cast<const S*>(rows.data) + rows.at(b, h, t, c)));
  });
  return value;
}
template <class T>
__device__ __forceinline__ void write(const HeadRows& rows, int64_t b, int64_t h, int64_t t,
                                      int64_t c, T value) {
  with_storage_type<T>(rows.dtype, [&](auto type) {
    using S = typename decltype(type)::type;
    global_store(static_cast<S*>(rows.data) + rows.at(b, h, t, c), from_compute<S>(value));
  });
}

}  // namespace latte::cuda
