// SPDX-License-Identifier: Apache-2.0
// The emulation itself: what each CUDA name does, against a plain statement of it.
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "device.h"
#include "ptx.h"

namespace {

using namespace latte::cuda;
namespace emulation = latte::emulation;

__global__ void reverse_through_shared(const float* in, float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const float* mine = in + static_cast<int64_t>(blockIdx.x) * threads;
  shared[thread] = mine[thread];
  __syncthreads();
  out[static_cast<int64_t>(blockIdx.x) * threads + thread] = shared[threads - 1 - thread];
}

TEST(Emulation, BlocksShareMemoryAcrossABarrier) {
  constexpr int kThreads = 96, kBlocks = 5;
  std::vector<float> in(kThreads * kBlocks), out(in.size(), -1);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  launch(reverse_through_shared, dim3(kBlocks), dim3(kThreads), kThreads * sizeof(float), nullptr,
         in.data(), out.data());
  for (int block = 0; block < kBlocks; ++block)
    for (int i = 0; i < kThreads; ++i)
      EXPECT_EQ(out[block * kThreads + i], in[block * kThreads + kThreads - 1 - i]);
}

__global__ void warp_sums(const int* in, int* out) {
  int sum = in[threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % 32 == 0) atomicAdd(out, sum);
}

TEST(Emulation, ShufflesReduceAWarp) {
  std::vector<int> in(128);
  int expected = 0, sum = 0;
  for (size_t i = 0; i < in.size(); ++i) expected += in[i] = static_cast<int>(i * i % 37);
  launch(warp_sums, dim3(1), dim3(128), 0, nullptr, in.data(), &sum);
  EXPECT_EQ(sum, expected);
}

}  // namespace
