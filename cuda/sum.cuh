// SPDX-License-Identifier: Apache-2.0
// Sums over rows of partial sums, in double and in one order: kSumRows threads per column take
// every kSumRows-th row, then one adds what they have. No atomics.
#pragma once

#include "cuda/element.h"
#include "cuda/heuristics.h"

namespace latte::cuda {

// sums[c] = sum over r < rows of partial[r * columns + c], given to finish(c, sum).
template <class T, class Finish>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    sum_rows(const T* partial, int64_t rows, int64_t columns, Finish finish) {
  auto* const sums = reinterpret_cast<double*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x), row = static_cast<int>(threadIdx.y);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kSumColumns + lane;
  double sum = 0;
  if (c < columns) {
#pragma unroll 4
    for (int64_t r = row; r < rows; r += kSumRows)
      sum += static_cast<double>(partial[r * columns + c]);
  }
  sums[row * kSumColumns + lane] = sum;
  __syncthreads();
  if (row != 0 || c >= columns) return;
  for (int r = 1; r < kSumRows; ++r) sum += sums[r * kSumColumns + lane];
  finish(c, sum);
}

inline constexpr int64_t kSumShared = int64_t{kSumColumns} * kSumRows * sizeof(double);

}  // namespace latte::cuda
