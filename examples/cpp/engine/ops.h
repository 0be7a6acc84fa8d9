// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "latte/latte.h"

namespace engine {

/// float32 memory as an operand of latte.h, strides in elements.
inline latte::Tensor view(const float* data, std::initializer_list<int64_t> shape,
                          std::initializer_list<int64_t> stride) {
  latte::Tensor tensor;
  tensor.data = const_cast<float*>(data);  // the structures serve inputs and outputs
  for (const int64_t size : shape) tensor.shape[tensor.rank++] = size;
  int64_t i = 0;
  for (const int64_t step : stride) tensor.stride[i++] = step;
  return tensor;
}

/// `heads` heads side by side in rows of `row` numbers, as (1, heads, tokens, width).
inline latte::Tensor heads_of(const float* data, int64_t heads, int64_t tokens, int64_t width,
                              int64_t row) {
  return view(data, {1, heads, tokens, width}, {0, width, row, 1});
}

/// The same for one token: (1, heads, width).
inline latte::Tensor token_of(const float* data, int64_t heads, int64_t width) {
  return view(data, {1, heads, width}, {0, width, 1});
}

/// Calls an operator of latte.h with the workspace that it asks for, kept between calls.
class Caller {
 public:
  explicit Caller(int threads) : threads_(threads) {}

  template <class Params>
  void operator()(void (*op)(const Params&, void*, int), const Params& params) {
    const auto bytes = static_cast<size_t>(latte::workspace_bytes(params, threads_));
    if (workspace_.size() < bytes) workspace_.resize(bytes);
    op(params, workspace_.data(), threads_);
  }

  int threads() const { return threads_; }

 private:
  int threads_;
  std::vector<std::byte> workspace_;
};

}  // namespace engine
