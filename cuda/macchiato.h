// SPDX-License-Identifier: Apache-2.0
// What the passes of Macchiato share.
#pragma once

#include "cuda/window_gate.cuh"
#include "latte/latte.h"

namespace latte::cuda {

// The columns 1.. of q_latent or of its gradient.
inline Tensor behind_gate(const Tensor& t) {
  const int64_t last = t.rank - 1;
  Tensor columns = t;
  if (t.data) columns.data = static_cast<char*>(t.data) + t.stride[last] * element_size(t.dtype);
  columns.shape[last] -= 1;
  return columns;
}

inline GateArgs gate_of(const Tensor& q_latent, int64_t latents, double scale) {
  return {head_rows(q_latent), static_cast<int>(latents), scale};
}

// A dense tensor in the workspace.
template <class T, size_t kRank>
Tensor dense(T* data, DType dtype, const int64_t (&shape)[kRank]) {
  Tensor t;
  t.data = data, t.dtype = dtype, t.rank = kRank;
  int64_t stride = 1;
  for (int64_t i = kRank - 1; i >= 0; --i)
    t.shape[i] = shape[i], t.stride[i] = stride, stride *= shape[i];
  return t;
}

}  // namespace latte::cuda
