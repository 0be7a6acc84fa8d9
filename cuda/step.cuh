// SPDX-License-Identifier: Apache-2.0
// One token of one key/value head, state updated in place:
//
//   max' = max(max, k)    norm' = norm exp(max - max') + exp(k - max')
//   alpha = exp(k - max') / norm'    mean += alpha (x) (v - mean)    y = softmax(q) . mean
//
// A thread block per sequence, key/value head and slice of D. Bound by the traffic of the state:
// L D + 2 L elements read and written, each once for up to kStepHeads query heads of a group (more
// read the mean again, from the first-level cache), q, k and v read and y written once. Where D is
// cut, every slice reads k, q, max and norm, and a second launch writes max and norm, since no
// block knows when the others have read them.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/rows.cuh"
#include "cuda/state.cuh"

namespace latte::cuda {

struct StepParams {
  Rows q, k, v, y;  // (N,heads,C)
  StateView state;
  int64_t kv_heads = 0, group = 1, latents = 0, dim = 0, heads = 0;  // heads: N times kv_heads
  int64_t slices = 1;
  double scale = 1;
};

template <class T>
inline constexpr T kLowest = sizeof(T) == 8 ? T(-DBL_MAX) : T(-FLT_MAX);
// Below any norm of a latent that has seen a key.
template <class T>
inline constexpr T kEmptyNorm = T(1e-30);

template <class T>
struct StepNormaliser {
  T max, norm, alpha;

  __device__ __forceinline__ StepNormaliser(const StepParams& p, int64_t n, int64_t h, int64_t l) {
    using std::exp;
    const T top = load_number<T>(p.state.max, n, h, l);
    const T key = static_cast<T>(p.scale) * read<T>(p.k, n, h, l);
    max = top > key ? top : key;
    // Finite even while the latent is empty, so that -inf - reference is -inf and not NaN.
    const T reference = max > kLowest<T> ? max : kLowest<T>;
    const T weight = exp(key - reference);
    norm = load_number<T>(p.state.norm, n, h, l) * exp(top - reference) + weight;
    alpha = weight / (norm > kEmptyNorm<T> ? norm : kEmptyNorm<T>);
  }
  __device__ __forceinline__ void write(const StepParams& p, int64_t n, int64_t h, int64_t l) {
    store_number(p.state.max, n, h, l, max);
    store_number(p.state.norm, n, h, l, norm);
  }
};

// Shared memory of a block; what is read and written in vectors comes first.
template <class T>
struct StepShared {
  T* sums;                   // (rows, kStepHeads, kStepChannels) of y
  Vector<T, kStepHeads>* p;  // (L,) softmax of q
  T* alpha;                  // (L,)
  T* value;                  // (kStepChannels,) of v

  static constexpr int64_t kSumBytes = int64_t{kStepThreads} * kStepHeads * kVectorBytes;

  __device__ __forceinline__ StepShared(unsigned char* memory, int64_t latents)
      : sums(reinterpret_cast<T*>(memory)),
        p(reinterpret_cast<Vector<T, kStepHeads>*>(memory + kSumBytes)),
        alpha(reinterpret_cast<T*>(p + latents)),
        value(alpha + latents) {}
  static constexpr int64_t bytes(int64_t latents) {
    return kSumBytes + ((kStepHeads + 1) * latents + kStepChannels) * int64_t{sizeof(T)};
  }
};

// Column g of s.p = softmax of query head `head`, by one warp; zeros where it is not `used`. A row
// that is -inf throughout has no probabilities.
template <class T>
__device__ __forceinline__ void step_softmax(const StepParams& p, const StepShared<T>& s, int64_t n,
                                             int64_t head, bool used, int g) {
  using std::exp;
  const int lane = static_cast<int>(threadIdx.x % 32);
  T top = kLowest<T>, sum = 0;
  for (int64_t l = lane; l < p.latents; l += 32) {
    const T logit = used ? static_cast<T>(p.scale) * read<T>(p.q, n, head, l) : T(0);
    s.p[l].values[g] = logit;
    top = logit > top ? logit : top;
  }
  for (int step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, top, step);
    top = other > top ? other : top;
  }
  for (int64_t l = lane; l < p.latents; l += 32) {
    const T e = used ? exp(s.p[l].values[g] - top) : T(0);
    s.p[l].values[g] = e;
    sum += e;
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  const T inverse = sum == 0 ? T(0) : 1 / sum;
  for (int64_t l = lane; l < p.latents; l += 32) s.p[l].values[g] *= inverse;
}

// The latents of one slice: the mean moves towards v, sums of y on the way.
template <class T, int N, bool kUpdate>
__device__ __forceinline__ void step_slice(const StepParams& p, const StepShared<T>& s, int64_t n,
                                           int64_t h, int64_t channel, int row, int rows,
                                           Vector<T, N> (&sums)[kStepHeads]) {
  T value[N];
  const int place = static_cast<int>(channel % kStepChannels);
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = s.value[place + i];
  for (int64_t first = row; first < p.latents; first += kStepLatents * rows) {
    T mean[kStepLatents][N];
#pragma unroll
    for (int j = 0; j < kStepLatents; ++j) {
      const int64_t l = first + j * rows;
      if (l < p.latents) load_vector(p.state.mean.at<T>(n, h, l, channel), mean[j]);
    }
#pragma unroll
    for (int j = 0; j < kStepLatents; ++j) {
      const int64_t l = first + j * rows;
      if (l >= p.latents) break;
      if constexpr (kUpdate) {
        const T alpha = s.alpha[l];
#pragma unroll
        for (int i = 0; i < N; ++i) mean[j][i] += alpha * (value[i] - mean[j][i]);
        store_vector(p.state.mean.at<T>(n, h, l, channel), mean[j]);
      }
      const Vector<T, kStepHeads> weight = s.p[l];
#pragma unroll
      for (int g = 0; g < kStepHeads; ++g)
#pragma unroll
        for (int i = 0; i < N; ++i) sums[g].values[i] += weight.values[g] * mean[j][i];
    }
  }
}

// Threads are rows of latents times vectors of N channels.
template <class T, int N>
__global__ void __launch_bounds__(kStepThreads, 2) step(StepParams p) {
  constexpr int kLanes = kStepChannels / N, kRows = kStepThreads / kLanes;
  const StepShared<T> s(shared_memory(), p.latents);
  const int64_t slice = blockIdx.x % p.slices, head = blockIdx.x / p.slices;
  const int64_t n = head / p.kv_heads, h = head % p.kv_heads;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, row = thread / kLanes;

  for (int64_t l = thread; l < p.latents; l += kStepThreads) {
    StepNormaliser<T> latent(p, n, h, l);
    s.alpha[l] = latent.alpha;
    if (p.slices == 1) latent.write(p, n, h, l);
  }
  for (int64_t g0 = 0; g0 < p.group; g0 += kStepHeads) {
    const int64_t first_head = h * p.group + g0, used = least(p.group - g0, kStepHeads);
    const int warp = thread / 32;
    if (warp < kStepHeads) step_softmax(p, s, n, first_head + warp, warp < used, warp);
    for (int64_t c0 = slice * kStepChannels; c0 < p.dim; c0 += p.slices * kStepChannels) {
      if (thread < kStepChannels && c0 + thread < p.dim)
        s.value[thread] = read<T>(p.v, n, h, c0 + thread);
      __syncthreads();
      const int64_t channel = c0 + lane * N;
      Vector<T, N> sums[kStepHeads] = {};
      if (channel < p.dim) {
        if (g0 == 0) {
          step_slice<T, N, true>(p, s, n, h, channel, row, kRows, sums);
        } else {
          step_slice<T, N, false>(p, s, n, h, channel, row, kRows, sums);
        }
      }
#pragma unroll
      for (int g = 0; g < kStepHeads; ++g) {
        T* const place = s.sums + (row * kStepHeads + g) * kStepChannels + lane * N;
        *reinterpret_cast<Vector<T, N>*>(place) = sums[g];
      }
      __syncthreads();
      const int g = thread / kStepChannels, c = thread % kStepChannels;
      if (g < used && c0 + c < p.dim) {
        T sum = 0;
        for (int r = 0; r < kRows; ++r) sum += s.sums[(r * kStepHeads + g) * kStepChannels + c];
        write(p.y, n, first_head + g, c0 + c, sum);
      }
    }
  }
}

// max and norm, once all slices have read them: a thread per latent.
template <class T>
__global__ void __launch_bounds__(kStepThreads) step_normalisers(StepParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kStepThreads + threadIdx.x;
  const int64_t l = index % p.latents, head = index / p.latents;
  if (head >= p.heads) return;
  const int64_t n = head / p.kv_heads, h = head % p.kv_heads;
  StepNormaliser<T>(p, n, h, l).write(p, n, h, l);
}

}  // namespace latte::cuda
