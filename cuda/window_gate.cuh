// SPDX-License-Identifier: Apache-2.0
// The gate between a window and the latents: per token the softmax over 1 + L logits, of which only
// the probability of column 0 and the sum of the others matter here:
//   y = share window + rest latents     share = p(0|t), rest = sum_(l>=1) p(l|t)
#pragma once

#include <cmath>

#include "cuda/attention.cuh"

namespace latte::cuda {

struct GateArgs {
  HeadRows logits;  // (B,H,T,1+L) or (N,H,1+L) in the compute type
  int latents = 0;
  double scale = 1;
};

template <class T>
struct Shares {
  T share, rest;
};

// Of a row, by a whole warp. A row that is -inf throughout has neither.
template <class T>
__device__ __forceinline__ Shares<T> shares_of(const GateArgs& gate, int64_t b, int64_t h,
                                               int64_t t) {
  using std::exp;
  const T scale = static_cast<T>(gate.scale), infinity = static_cast<T>(kInfinity);
  const T* const row = static_cast<const T*>(gate.logits.data) + gate.logits.at(b, h, t, 0);
  const auto logit = [&](int l) { return scale * global_load(row + l * gate.logits.stride_c); };
  const T own = logit(0);
  T high = own, others = 0;
  for (int l = 1 + lane_id(); l <= gate.latents; l += 32) high = max(high, logit(l));
  high = across_warp(high, [](T x, T y) { return max(x, y); });
  if (high == -infinity) high = 0;
  for (int l = 1 + lane_id(); l <= gate.latents; l += 32) others += exp(logit(l) - high);
  others = across_warp(others, [](T x, T y) { return x + y; });
  const T window = exp(own - high), sum = others + window;
  if (sum == 0) return {0, 0};
  return {window / sum, others / sum};
}

}  // namespace latte::cuda
