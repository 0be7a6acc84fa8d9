// SPDX-License-Identifier: Apache-2.0
// The state (max, norm, mean) of latte.h as kernels see it, in the compute type.
#pragma once

#include <cmath>

#include "cuda/call.h"
#include "cuda/element.h"

namespace latte::cuda {

// A tensor of up to four dimensions, the last ones zero steps apart where it has fewer.
struct View {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};

  template <class S>
  __device__ __forceinline__ S* at(int64_t i, int64_t j, int64_t k, int64_t l = 0) const {
    return static_cast<S*>(data) + i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3];
  }
};

inline View view_of(const Tensor& t) {
  View view{t.data};
  for (int64_t i = 0; i < t.rank; ++i) view.stride[i] = t.stride[i];
  return view;
}

struct StateView {
  View max, norm;  // (N,Hk,L)
  View mean;       // (N,Hk,L,D)

  __host__ __device__ __forceinline__ bool present() const { return norm.data != nullptr; }
};

inline StateView view_of(const State& s) {
  return {view_of(s.max), view_of(s.norm), view_of(s.mean)};
}

// The merge of the state algebra, of one latent:
//   max = max(a.max, b.max)   wa = a.norm exp(a.max - max)   wb = b.norm exp(b.max - max)
//   norm = wa + wb            mean = a.mean + share (b.mean - a.mean), share = wb / norm
template <class T>
struct Merged {
  T max, norm, share;

  __device__ __forceinline__ Merged(T a_max, T a_norm, T b_max, T b_norm)
      : max(a_max > b_max ? a_max : b_max) {
    using std::exp;
    const T a_mass = a_norm == 0 ? T(0) : a_norm * exp(a_max - max);
    const T b_mass = b_norm == 0 ? T(0) : b_norm * exp(b_max - max);
    norm = a_mass + b_mass;
    share = norm == 0 ? T(0) : b_mass / norm;
  }
};

template <class T>
__device__ __forceinline__ T load_number(const View& view, int64_t n, int64_t h, int64_t l) {
  return global_load(view.at<T>(n, h, l));
}
template <class T>
__device__ __forceinline__ void store_number(const View& view, int64_t n, int64_t h, int64_t l,
                                             T value) {
  global_store(view.at<T>(n, h, l), value);
}

}  // namespace latte::cuda
