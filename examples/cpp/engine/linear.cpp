// SPDX-License-Identifier: Apache-2.0
#include "linear.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace engine {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectors = 4;  // 32 registers: 24 sums, 4 weights
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kVectors = 2;  // 16 registers: 12 sums, 2 weights
#else
constexpr int kVectorBytes = 16, kVectors = 2;
#endif
// Rows of x whose sums fit into the registers.
constexpr int kRows = 6;

#if defined(__GNUC__)
typedef float Vector __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
#else
// For a compiler without vector types: correct, and as fast as it vectorises the loops.
struct Vector {
  float lane[kVectorBytes / 4];
};
inline Vector operator*(float a, Vector b) {
  for (float& lane : b.lane) lane *= a;
  return b;
}
inline Vector& operator+=(Vector& a, const Vector& b) {
  for (int i = 0; i < kVectorBytes / 4; ++i) a.lane[i] += b.lane[i];
  return a;
}
#endif
constexpr int kLanes = kVectorBytes / 4, kPanel = kVectors * kLanes;

// Below this many multiply-adds a parallel region, some microseconds, costs more than it gains.
constexpr int64_t kSerial = 1 << 16;

// `rows` rows of x (rows, inputs) times one panel, into sums (rows, kPanel).
template <int rows>
void multiply(const float* x, int64_t x_stride, int64_t inputs, const float* panel,
              const float* bias, float* sums) {
  Vector sum[rows][kVectors];
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < kVectors; ++c) std::memcpy(&sum[r][c], bias + c * kLanes, sizeof(Vector));
  for (int64_t i = 0; i < inputs; ++i) {
    Vector weight[kVectors];
    for (int c = 0; c < kVectors; ++c)
      std::memcpy(&weight[c], panel + i * kPanel + c * kLanes, sizeof(Vector));
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < kVectors; ++c) sum[r][c] += x[r * x_stride + i] * weight[c];
  }
  std::memcpy(sums, sum, sizeof sum);
}

using Multiply = void (*)(const float*, int64_t, int64_t, const float*, const float*, float*);
constexpr Multiply kMultiply[kRows] = {multiply<1>, multiply<2>, multiply<3>,
                                       multiply<4>, multiply<5>, multiply<6>};

int64_t panels_for(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

}  // namespace

Linear::Linear(int64_t inputs, int64_t outputs)
    : inputs_(inputs),
      outputs_(outputs),
      panels_(static_cast<size_t>(panels_for(outputs) * kPanel * inputs)),
      bias_(static_cast<size_t>(panels_for(outputs) * kPanel)) {}

void Linear::set(int64_t first, const std::vector<float>& weight, const std::vector<float>& bias) {
  const int64_t rows = static_cast<int64_t>(weight.size()) / inputs_;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t output = first + r, panel = output / kPanel, lane = output % kPanel;
    float* const column = panels_.data() + panel * kPanel * inputs_ + lane;
    for (int64_t i = 0; i < inputs_; ++i)
      column[i * kPanel] = weight[static_cast<size_t>(r * inputs_ + i)];
  }
  std::copy(bias.begin(), bias.end(), bias_.begin() + first);
}

void Linear::operator()(const float* x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride,
                        int threads, bool accumulate) const {
  if (rows * inputs_ * outputs_ < kSerial) threads = 1;
  parallel_for(panels_for(outputs_), threads, [&](int64_t p) {
    const float* const panel = panels_.data() + p * kPanel * inputs_;
    const int64_t first = p * kPanel, width = std::min<int64_t>(kPanel, outputs_ - first);
    float sums[kRows * kPanel];
    for (int64_t begin = 0; begin < rows; begin += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows - begin);
      kMultiply[count - 1](x + begin * x_stride, x_stride, inputs_, panel, bias_.data() + first,
                           sums);
      for (int64_t r = 0; r < count; ++r) {
        float* const out = y + (begin + r) * y_stride + first;
        const float* const sum = sums + r * kPanel;
        for (int64_t c = 0; c < width; ++c) out[c] = accumulate ? out[c] + sum[c] : sum[c];
      }
    }
  });
}

}  // namespace engine
