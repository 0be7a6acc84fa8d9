// SPDX-License-Identifier: Apache-2.0
// Pairs of channels turned by angles that depend on the token alone. A block makes a table of the
// cosines and sines of kRotateTokens tokens in shared memory and turns all its heads by it.
// Elements moved: each of x read once, each of y written once.
//
// Angles are float64, also for float32 rows: at position 1,000,000 a float32 angle is off by 0.03.
// They are reduced to [-pi/4, pi/4] here, since sin() of the CUDA library keeps the bits of pi for
// large angles in local memory.
#pragma once

#include <cmath>

#include "cuda/call.h"
#include "cuda/element.h"
#include "cuda/state.cuh"

namespace latte::cuda {

struct RotateParams {
  View x, y;                    // (B,H,T,D)
  View position;                // (B,T), the stride of B 0 for (T,)
  const void* rates = nullptr;  // of all pairs; null: `own_rates`
  bool double_rates = false;
  int64_t rate_stride = 0;
  double own_rates[kRotatePairs];  // of the pairs of this launch, from the host
  int64_t heads = 0, tokens = 0, channels = 0;
  int64_t groups = 1;     // of heads, on different blocks
  int64_t all_pairs = 0;  // of a row
  int64_t first_pair = 0;
  int pairs = 0;      // of this launch
  bool rest = false;  // copies the channels that belong to no pair
  bool inverse = false;
};

// cos and sin of an angle of less than about 2^50.
template <class T>
__device__ __forceinline__ void turn(double angle, T& cosine, T& sine) {
  using std::fma, std::rint;
  // pi / 2 and what float64 leaves of it. The first difference is exact: its bits span less than 53
  // places from the last one of pi / 2 on.
  constexpr double kHalfPi = 0x1.921fb54442d18p0, kRest = 0x1.1a62633145c07p-54;
  const double quarter = rint(angle * 0x1.45f306dc9c883p-1);
  const double r = fma(-quarter, kRest, fma(-quarter, kHalfPi, angle));
  // Taylor series in r^2, which at pi / 4 miss less than a quarter of the last place.
  constexpr int kTerms = sizeof(T) == 8 ? 9 : 5;
  const T x = static_cast<T>(r), square = x * x;
  T c = 1, s = 1;
#pragma unroll
  for (int i = kTerms; i > 0; --i) {
    c = 1 - c * (square * T(1.0 / (2 * i * (2 * i - 1))));
    s = 1 - s * (square * T(1.0 / (2 * i * (2 * i + 1))));
  }
  s *= x;
  const int q = static_cast<int>(static_cast<int64_t>(quarter) & 3);
  const T near = q & 1 ? s : c, far = q & 1 ? c : s;
  cosine = (q + 1) & 2 ? -near : near;
  sine = q & 2 ? -far : far;
}

// Threads are lanes of N pairs times rows. Two vectors of N elements per lane: the first and second
// halves of its pairs, or interleaved its pairs one after the other.
template <class S, int N, bool kInterleaved>
__global__ void __launch_bounds__(kRotateThreads, 2) rotate_rows(RotateParams p) {
  using T = Compute<S>;
  // (tokens, N, units of N pairs): the lanes of a row then read neighbours, and the padding puts
  // two rows of 8 lanes on different banks.
  auto* const table = reinterpret_cast<Vector<T, 2>*>(shared_memory());
  const int units = p.pairs / N, stride = p.pairs + kRotatePadding;
  const int64_t tiles = ceil_div(p.tokens, kRotateTokens), index = blockIdx.x;
  const int64_t first = index % tiles * kRotateTokens, group = index / tiles % p.groups;
  const int64_t b = index / tiles / p.groups;
  const int64_t head = p.heads * group / p.groups, heads = p.heads * (group + 1) / p.groups - head;
  const int tokens = static_cast<int>(least(p.tokens - first, kRotateTokens));
  const int width = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x);
  const int thread = static_cast<int>(threadIdx.y) * width + lane;

  for (int i = thread; i < tokens * p.pairs; i += kRotateThreads) {
    const int t = i / p.pairs, pair = i % p.pairs;
    const int64_t at = (p.first_pair + pair) * p.rate_stride;
    const double rate = !p.rates         ? p.own_rates[pair]
                        : p.double_rates ? static_cast<const double*>(p.rates)[at]
                                         : static_cast<const float*>(p.rates)[at];
    const auto position = static_cast<double>(*p.position.at<const int64_t>(b, first + t, 0));
    Vector<T, 2> entry;
    turn(position * rate, entry.values[0], entry.values[1]);
    if (p.inverse) entry.values[1] = -entry.values[1];
    table[t * stride + pair % N * units + pair / N] = entry;
  }
  __syncthreads();

  const int64_t rows = heads * tokens;
  for (int64_t row = threadIdx.y; row < rows; row += blockDim.y) {
    const int t = static_cast<int>(row % tokens);
    const S* const x = p.x.at<S>(b, head + row / tokens, first + t);
    S* const y = p.y.at<S>(b, head + row / tokens, first + t);
    const int64_t from = p.x.stride[3], to = p.y.stride[3];
    for (int unit = lane; unit < units; unit += width) {
      const int64_t own = p.first_pair + unit * N;
      const int64_t near = kInterleaved ? 2 * own : own;
      const int64_t far = kInterleaved ? near + N : own + p.all_pairs;
      T a[N], c[N];
      load_vector(x + near * from, a), load_vector(x + far * from, c);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Vector<T, 2> angle = table[t * stride + i * units + unit];
        T& u = kInterleaved ? (2 * i < N ? a[2 * i] : c[2 * i - N]) : a[i];
        T& v = kInterleaved ? (2 * i + 1 < N ? a[2 * i + 1] : c[2 * i + 1 - N]) : c[i];
        const T turned = u * angle.values[0] - v * angle.values[1];
        v = u * angle.values[1] + v * angle.values[0];
        u = turned;
      }
      store_vector(y + near * to, a), store_vector(y + far * to, c);
    }
    if (!p.rest) continue;
    for (int64_t c = 2 * p.all_pairs + lane; c < p.channels; c += width)
      global_store(y + c * to, global_load(x + c * from));
  }
}

}  // namespace latte::cuda
