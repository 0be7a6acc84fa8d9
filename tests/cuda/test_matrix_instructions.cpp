// SPDX-License-Identifier: Apache-2.0
// Layouts of mma and ldmatrix: matrices go through shared memory and fragments as a kernel moves
// them and must come out as a plain matrix product. Operands are small integers: sums are exact.
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "cuda/device.h"
#include "cuda/ptx.h"

namespace {

using namespace latte::cuda;
namespace emulation = latte::emulation;

float entry(int row, int column, int salt) {
  return static_cast<float>((row * 31 + column * 17 + salt * 7) % 23 - 11);
}

template <class T>
T convert(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16(x);
  else
    return __float2half(x);
}

template <class T>
std::vector<T> matrix(int rows, int columns, int salt) {
  std::vector<T> values;
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < columns; ++column)
      values.push_back(convert<T>(entry(row, column, salt)));
  return values;
}

// Rows of 16 elements are padded to 24: 48 bytes, so that eight of them meet different banks.
constexpr int kStride = 24;

template <class T>
__device__ void stage(T* tile, const T* source, int rows, int columns) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += 32)
    tile[i / columns * kStride + i % columns] = source[i];
}

__device__ void store_fragment(float* out, const float (&d)[4], int column) {
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i)
    out[(lane / 4 + i / 2 * 8) * 16 + column + lane % 4 * 2 + i % 2] = d[i];
}

enum class Form { plain, b_transposed, a_transposed, pairs };

// out (16,16) = 1 + a b. b is stored (16,16) by rows of k, or transposed by rows of columns, which
// is how keys lie; a likewise.
template <class T, Form kForm>
__global__ void multiply(const T* a, const T* b, float* out) {
  T* a_tile = reinterpret_cast<T*>(shared_memory());
  T* b_tile = a_tile + 16 * kStride;
  stage(a_tile, a, 16, 16);
  stage(b_tile, b, 16, 16);
  __syncwarp();
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a_registers[4], b_registers[4];
  const int low = lane % 16, high = lane / 16 * 8;
  if constexpr (kForm == Form::a_transposed)
    ldmatrix_x4_trans(a_registers, a_tile + (lane % 8 + high) * kStride + lane / 8 % 2 * 8);
  else
    ldmatrix_x4(a_registers, a_tile + low * kStride + high);
  if constexpr (kForm == Form::b_transposed) {
    ldmatrix_x4(b_registers, b_tile + (lane % 8 + high) * kStride + lane / 8 % 2 * 8);
  } else if constexpr (kForm == Form::pairs) {
    for (int n = 0; n < 2; ++n) {
      uint32_t pair[2];
      ldmatrix_x2_trans(pair, b_tile + low * kStride + 8 * n);
      b_registers[2 * n] = pair[0];
      b_registers[2 * n + 1] = pair[1];
    }
  } else {
    ldmatrix_x4_trans(b_registers, b_tile + low * kStride + high);
  }
  for (int n = 0; n < 2; ++n) {
    float d[4] = {1, 1, 1, 1};
    mma_m16n8k16<T>(d, a_registers, b_registers[2 * n], b_registers[2 * n + 1]);
    store_fragment(out, d, 8 * n);
  }
}

template <class T, Form kForm>
void expect_product() {
  const std::vector<T> a = matrix<T>(16, 16, 1), b = matrix<T>(16, 16, 2);
  std::vector<float> out(256, NAN);
  emulation::reset_counters();
  launch(multiply<T, kForm>, dim3(1), dim3(32), 2 * 16 * kStride * sizeof(T), nullptr, a.data(),
         b.data(), out.data());
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 16; ++column) {
      float expected = 1;
      for (int k = 0; k < 16; ++k)
        expected += (kForm == Form::a_transposed ? entry(k, row, 1) : entry(row, k, 1)) *
                    (kForm == Form::b_transposed ? entry(column, k, 2) : entry(k, column, 2));
      EXPECT_EQ(out[static_cast<size_t>(row * 16 + column)], expected) << row << "," << column;
    }
  EXPECT_EQ(emulation::counters().mma, 2u);
  EXPECT_EQ(emulation::counters().ldmatrix, 8u);
  EXPECT_EQ(emulation::counters().ldmatrix_conflicts, 0u);
}

TEST(Mma, Bfloat16) { expect_product<__nv_bfloat16, Form::plain>(); }
TEST(Mma, Float16) { expect_product<__half, Form::plain>(); }
TEST(Mma, OfTransposedB) { expect_product<__nv_bfloat16, Form::b_transposed>(); }
TEST(Mma, OfTransposedA) { expect_product<__half, Form::a_transposed>(); }
TEST(Mma, OfPairsOfMatrices) { expect_product<__nv_bfloat16, Form::pairs>(); }

// Fragments by the register table of the PTX ISA: a (16,8), b (8,8), out (16,8).
__global__ void multiply_tf32(const float* a, const float* b, float* out) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const uint32_t fragment[4] = {__float_as_uint(a[g * 8 + t]), __float_as_uint(a[(g + 8) * 8 + t]),
                                __float_as_uint(a[g * 8 + t + 4]),
                                __float_as_uint(a[(g + 8) * 8 + t + 4])};
  float d[4] = {};
  mma_m16n8k8_tf32(d, fragment, __float_as_uint(b[t * 8 + g]), __float_as_uint(b[(t + 4) * 8 + g]));
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

TEST(Mma, Tf32IgnoresTheLowBits) {
  std::vector<float> a(128), b(64), out(128, NAN);
  for (int i = 0; i < 128; ++i) a[static_cast<size_t>(i)] = entry(i / 8, i % 8, 3) * (1 + 0x1p-12f);
  for (int i = 0; i < 64; ++i) b[static_cast<size_t>(i)] = entry(i / 8, i % 8, 4);
  launch(multiply_tf32, dim3(1), dim3(32), 0, nullptr, a.data(), b.data(), out.data());
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      float expected = 0;
      for (int k = 0; k < 8; ++k) expected += entry(row, k, 3) * entry(k, column, 4);
      EXPECT_EQ(out[static_cast<size_t>(row * 8 + column)], expected) << row << "," << column;
    }
}

// Where an address is read by all eight rows of a matrix, seven wavefronts are too many.
__global__ void load_row(const void* offset_bytes) {
  const auto* offset = static_cast<const int*>(offset_bytes);
  uint32_t result[2];
  ldmatrix_x2(result, shared_memory() + offset[threadIdx.x]);
}

TEST(Ldmatrix, CountsBankConflicts) {
  const auto conflicts = [](int row_bytes) {
    std::vector<int> offsets(32);
    // Lanes 16 to 31 pass addresses that do not matter.
    for (int lane = 0; lane < 32; ++lane)
      offsets[static_cast<size_t>(lane)] = lane < 16 ? lane % 8 * row_bytes : 1 << 20;
    emulation::reset_counters();
    launch(load_row, dim3(1), dim3(32), 2048, nullptr, offsets.data());
    return emulation::counters().ldmatrix_conflicts;
  };
  EXPECT_EQ(conflicts(16), 0u);
  EXPECT_EQ(conflicts(32), 2 * 1u);
  EXPECT_EQ(conflicts(64), 2 * 3u);
  EXPECT_EQ(conflicts(128), 2 * 7u);
  EXPECT_EQ(conflicts(144), 0u);
}

TEST(Ldmatrix, RefusesRowsOutsideOfSharedMemoryAndMisalignedOnes) {
  const std::vector<int> outside(32, 2048), misaligned(32, 8);
  EXPECT_THROW(launch(load_row, dim3(1), dim3(32), 2048, nullptr, outside.data()),
               emulation::Fault);
  EXPECT_THROW(launch(load_row, dim3(1), dim3(32), 2048, nullptr, misaligned.data()),
               emulation::Fault);
}

}  // namespace
