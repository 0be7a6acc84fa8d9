// SPDX-License-Identifier: Apache-2.0
// The caller's tensors as the rows of one head.
#pragma once

#include <string>

#include "common/element_size.h"
#include "common/validate.h"
#include "cpu/kernels.h"

namespace latte::cpu {

inline void* at(const Tensor& t, int64_t offset) {
  return static_cast<char*>(t.data) + offset * element_size(t.dtype);
}

// Rows (t, c) of a (B, heads, T, C) tensor from head `head` and token `first` on.
inline Rows rows_of(const Tensor& t, int64_t batch, int64_t head, int64_t first) {
  if (!present(t)) return {};
  return {at(t, batch * t.stride[0] + head * t.stride[1] + first * t.stride[2]), t.dtype,
          t.stride[2], t.stride[1], t.stride[3]};
}

// One number per token: of a (B, heads, T) tensor.
inline Column column_of(const Tensor& t, int64_t batch, int64_t head, int64_t first) {
  if (!present(t)) return {};
  return {at(t, batch * t.stride[0] + head * t.stride[1] + first * t.stride[2]), t.stride[2],
          t.stride[1]};
}

// The same of an (N, heads, C) tensor: one token.
inline Rows row_of(const Tensor& t, int64_t sequence, int64_t head) {
  if (!present(t)) return {};
  return {at(t, sequence * t.stride[0] + head * t.stride[1]), t.dtype, 0, t.stride[1], t.stride[2]};
}

inline constexpr int64_t kAlignment = 64;

constexpr int64_t round_to_alignment(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// The first aligned byte of a workspace, which a call must have.
inline char* workspace_base(void* workspace, const char* op) {
  if (!workspace)
    throw Error(Error::Kind::value,
                "[" + std::string(op) + "] workspace is null, expected workspace_bytes() bytes");
  const auto address = reinterpret_cast<uintptr_t>(workspace);
  return static_cast<char*>(workspace) + (kAlignment - address % kAlignment) % kAlignment;
}

}  // namespace latte::cpu
