// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

namespace engine {

/// y = x W^T + b, float32, for one row of x or many.
///
/// W (outputs, inputs) is kept in panels of as many outputs as a few vector registers hold, the
/// outputs of one input side by side. One row streams every weight once, in order: as fast as
/// memory. Many rows use a panel while it is in the cache, several rows for each weight loaded.
class Linear {
 public:
  Linear() = default;
  Linear(int64_t inputs, int64_t outputs);

  /// Sets the weights of the outputs [first, first + rows): weight (rows, inputs), bias (rows,) or
  /// empty for none.
  void set(int64_t first, const std::vector<float>& weight, const std::vector<float>& bias = {});

  /// y[r] = W x[r] + b, or y[r] += W x[r] + b, for r < rows; rows are `x_stride` and `y_stride`
  /// numbers apart. x and y do not overlap.
  void operator()(const float* x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride,
                  int threads, bool accumulate = false) const;

  int64_t inputs() const { return inputs_; }
  int64_t outputs() const { return outputs_; }

 private:
  int64_t inputs_ = 0, outputs_ = 0;
  std::vector<float> panels_;  // (panels, inputs, panel width)
  std::vector<float> bias_;    // (panels, panel width)
};

}  // namespace engine
