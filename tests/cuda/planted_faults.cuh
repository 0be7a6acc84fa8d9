// SPDX-License-Identifier: Apache-2.0
// Small kernels in the manner of the library's, each right with Plant::none and wrong in one way
// with any other.
#pragma once

#include "cuda/device.h"
#include "cuda/ptx.h"

namespace latte::cuda {

enum class Plant {
  none,
  // block_max
  missing_syncthreads,
  divergent_barrier,
  early_exit,
  race_before_barrier,
  shared_overrun,
  inactive_shuffle_lane,
  // pipelined_sums
  wrong_wait_count,
  missing_barrier_after_wait,
  overwritten_while_read,
  out_of_bounds_tail,
  misaligned_copy,
  copy_in_flight,
  // causal_scores
  missing_syncwarp,
  missing_syncwarp_copy_out,
  write_after_read,
  mask_off_by_one,
  partial_warp_mma,
  // produce_and_consume
  missing_named_partner,
  named_count_mismatch,
  unwaited_named_barrier,
  // grid_sum
  missing_fence,
  plain_add_across_blocks,
  neighbour_block_race,
  endless_spin,
};

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMaxThreads = 128;

// out[i] = max(in), one block of 128 threads.
template <Plant kPlant>
__global__ void block_max(const float* in, float* out) {
  constexpr int kWarps = kMaxThreads / 32;
  float* partial = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  if (kPlant == Plant::early_exit && warp == 3) return;
  float value = in[thread];
  for (int distance = 16; distance > 0; distance /= 2) {
    if (kPlant == Plant::inactive_shuffle_lane && lane >= 16) break;
    const unsigned mask = kPlant == Plant::inactive_shuffle_lane ? 0xffffu : kFullWarp;
    value = fmaxf(value, __shfl_xor_sync(mask, value, distance));
  }
  if (lane == 0) partial[warp] = value;
  if (kPlant == Plant::shared_overrun && thread == 0) partial[kWarps] = value;
  if constexpr (kPlant == Plant::divergent_barrier) {
    if (warp == 0)
      __syncthreads();
    else
      __syncthreads();
  } else if constexpr (kPlant != Plant::missing_syncthreads) {
    __syncthreads();
  }
  for (int w = 0; w < kWarps; ++w) value = fmaxf(value, partial[w]);
  if (kPlant == Plant::race_before_barrier && thread == kMaxThreads - 1) partial[0] = -1;
  __syncthreads();
  out[thread] = value;
}

constexpr int kCopyThreads = 64, kChunk = 4 * kCopyThreads;

// out[i] = the sum of in[c kChunk + j] over chunks c and the four j of thread 63 - i.
template <Plant kPlant>
__global__ void pipelined_sums(const float* in, int size, float* out) {
  float* buffers = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const int chunks = (size + kChunk - 1) / kChunk;
  const auto load = [&](int chunk) {
    const int begin = chunk * kChunk + 4 * thread;
    const bool valid = begin < size || kPlant == Plant::out_of_bounds_tail;
    const float* source = in + (valid ? begin : 0) + (kPlant == Plant::misaligned_copy);
    async_copy_16(buffers + chunk % 2 * kChunk + 4 * thread, source, valid);
    async_copy_commit();
  };
  float sum = 0;
  load(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunk + 1 < chunks) {
      load(chunk + 1);
      async_copy_wait<kPlant == Plant::wrong_wait_count ? 2 : 1>();
    } else {
      async_copy_wait<0>();
    }
    if constexpr (kPlant != Plant::missing_barrier_after_wait) __syncthreads();
    const int offset = 4 * (kCopyThreads - 1 - thread);
    for (int i = 0; i < 4; ++i)
      if (chunk * kChunk + offset + i < size) sum += buffers[chunk % 2 * kChunk + offset + i];
    if constexpr (kPlant != Plant::overwritten_while_read) __syncthreads();
  }
  if constexpr (kPlant == Plant::copy_in_flight) load(chunks);
  out[thread] = sum;
}

// out (16,16) per warp = the lower triangle of q k^T, with q and k (16,16) per warp in bfloat16.
template <Plant kPlant>
__global__ void causal_scores(const __nv_bfloat16* q, const __nv_bfloat16* k, float* out) {
  constexpr int kTile = 256;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  unsigned char* mine = shared_memory() + static_cast<size_t>(warp) * kTile * sizeof(float);
  auto* q_tile = reinterpret_cast<__nv_bfloat16*>(mine);
  __nv_bfloat16* k_tile = q_tile + kTile;
  auto* staged = reinterpret_cast<float*>(mine);  // over both
  const int row = lane % 16, half = lane / 16 * 8;
  const auto copy = [&](__nv_bfloat16* tile, const __nv_bfloat16* source) {
    reinterpret_cast<uint4*>(tile)[lane] =
        reinterpret_cast<const uint4*>(source + warp * kTile)[lane];
  };
  copy(q_tile, q);
  copy(k_tile, k);
  if constexpr (kPlant != Plant::missing_syncwarp) __syncwarp();
  uint32_t a[4], b[4];
  float scores[2][4] = {};
  ldmatrix_x4(a, q_tile + row * 16 + half);
  ldmatrix_x4(b, k_tile + row * 16 + half);
  // Row-major k is column-major k^T; matrices 0, 2 are its first eight keys, 1, 3 the others.
  if (kPlant != Plant::partial_warp_mma || lane < 16)
    mma_m16n8k16<__nv_bfloat16>(scores[0], a, b[0], b[2]);
  mma_m16n8k16<__nv_bfloat16>(scores[1], a, b[1], b[3]);
  if constexpr (kPlant != Plant::write_after_read) __syncwarp();
  for (int n = 0; n < 2; ++n)
    for (int i = 0; i < 4; ++i) {
      const int query = lane / 4 + i / 2 * 8, key = 8 * n + lane % 4 * 2 + i % 2;
      const int last = query + (kPlant == Plant::mask_off_by_one);
      staged[query * 16 + key] = key > last ? 0.0f : scores[n][i];
    }
  if constexpr (kPlant != Plant::missing_syncwarp_copy_out) __syncwarp();
  for (int i = lane; i < kTile; i += 32) out[warp * kTile + i] = staged[i];
}

// out[i] = the sum over tiles of in[tile 32 + 31 - i]: warp 0 produces tiles, warp 1 adds them up.
template <Plant kPlant>
__global__ void produce_and_consume(const float* in, int tiles, float* out) {
  constexpr int kFull = 1, kEmpty = 2, kThreads = 64;
  float* tile_values = reinterpret_cast<float*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x < 32) {
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile > 0 && kPlant != Plant::unwaited_named_barrier) named_barrier_sync(kEmpty, kThreads);
      tile_values[lane] = in[tile * 32 + lane];
      named_barrier_arrive(kFull, kPlant == Plant::named_count_mismatch ? 32 : kThreads);
    }
    return;
  }
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    named_barrier_sync(kFull, kThreads);
    sum += tile_values[31 - lane];
    if (tile + 1 < tiles && kPlant != Plant::missing_named_partner &&
        kPlant != Plant::unwaited_named_barrier)
      named_barrier_arrive(kEmpty, kThreads);
  }
  out[lane] = sum;
}

// total = the sum of in, by the block that finishes last. `done` counts finished blocks.
template <Plant kPlant>
__global__ void grid_sum(const float* in, float* partial, unsigned* done, float* total) {
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  float value = in[block * 32 + static_cast<int>(threadIdx.x)];
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_down_sync(kFullWarp, value, static_cast<unsigned>(distance));
  if (threadIdx.x != 0) return;
  if constexpr (kPlant == Plant::plain_add_across_blocks) {
    *total += value;
    return;
  }
  if constexpr (kPlant == Plant::neighbour_block_race) {
    partial[block] = value + (block > 0 ? partial[block - 1] : 0.0f);
    if (block == blocks - 1) *total = partial[block];
    return;
  }
  partial[block] = value;
  if constexpr (kPlant != Plant::missing_fence) __threadfence();
  const unsigned before = atomicAdd(done, 1u);
  if constexpr (kPlant == Plant::endless_spin)
    while (atomicAdd(done, 0u) <= gridDim.x) spin_pause();
  if (before != gridDim.x - 1) return;
  if constexpr (kPlant != Plant::missing_fence) __threadfence();
  float sum = 0;
  for (int i = 0; i < blocks; ++i) sum += partial[i];
  *total = sum;
}

}  // namespace latte::cuda
