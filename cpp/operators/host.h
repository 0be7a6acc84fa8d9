// SPDX-License-Identifier: Apache-2.0
// The operators of torch.ops.latte_ext, written once for every way to hold a torch tensor: an
// operator has a schema and `run`, which allocates the results and calls the core.
//
// A Host has the types Tensor and Optional, and
//   view(x)               latte::Tensor on its memory, Tensor{} for what is not given
//   empty(like, dtype, sizes), empty_like(x)    new tensors beside another; the second in the
//                                               order of x's memory
//   extra(like, dtype, sizes)   as empty, or nothing where the caller has no use for that result
//   zero(x), clone(x)
//   call(on_cpu, on_cuda, params)
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "latte/cuda.h"
#include "latte/latte.h"

namespace latte::operators {

template <class H>
using In = const typename H::Tensor&;
template <class H>
using Maybe = const typename H::Optional&;
template <class H>
using Out = typename H::Tensor;

using Sizes = std::vector<int64_t>;

inline bool given(const Tensor& t) { return t.rank != 0 || t.data != nullptr; }

// The type of arithmetic and states.
inline DType wide_type(const Tensor& x) {
  return x.dtype == DType::float64 ? DType::float64 : DType::float32;
}

inline Sizes sizes(const Tensor& x) { return {x.shape, x.shape + (x.rank < 4 ? x.rank : 4)}; }

inline std::string text(const Tensor& x) {
  std::string out = "(";
  for (int64_t i = 0; i < x.rank && i < 4; ++i) out += (i ? ", " : "") + std::to_string(x.shape[i]);
  return out + (x.rank > 4 ? ", ...)" : x.rank == 1 ? ",)" : ")");
}

[[noreturn]] inline void refuse(const char* op, const char* name, const Tensor& x,
                                const std::string& expected) {
  throw Error(Error::Kind::value, "[" + std::string(op) + "] " + name + " has shape " + text(x) +
                                      ", expected " + expected);
}

struct Named {
  const char* name;
  const Tensor& tensor;
};

// Results are sized from these shapes before the core sees the call.
inline void check_rank(const char* op, int64_t rank, std::initializer_list<Named> tensors) {
  for (const Named& x : tensors)
    if (x.tensor.rank != rank) refuse(op, x.name, x.tensor, std::to_string(rank) + " dimensions");
}

inline void check_shape(const char* op, const char* name, const Tensor& x, const Sizes& expected) {
  if (x.rank <= 4 && sizes(x) == expected) return;
  Tensor wanted;
  wanted.rank = static_cast<int64_t>(expected.size());
  for (size_t i = 0; i < expected.size(); ++i) wanted.shape[i] = expected[i];
  refuse(op, name, x, text(wanted));
}

// N: the batch of x, or the sequences packed along its tokens.
inline int64_t count_sequences(const char* op, const Tensor& x, const Tensor& cu_seqlens) {
  if (!given(cu_seqlens)) return x.shape[0];
  if (cu_seqlens.rank != 1 || cu_seqlens.shape[0] < 1)
    refuse(op, "cu_seqlens", cu_seqlens, "(sequences + 1,)");
  return cu_seqlens.shape[0] - 1;
}

// An uninitialised contiguous tensor of x's shape.
template <class H>
Out<H> like(H& host, In<H> x) {
  const Tensor t = host.view(x);
  return host.empty(x, t.dtype, sizes(t));
}

// No elements, of the type of `other`, for the gradient of what is not given.
template <class H>
Out<H> like_or_nothing(H& host, Maybe<H> x, In<H> other) {
  const Tensor t = host.view(x);
  if (given(t)) return host.empty(other, t.dtype, sizes(t));
  return host.empty(other, host.view(other).dtype, {0});
}

// What `like_or_nothing` made, as the core takes it.
template <class H>
Tensor if_given(H& host, Maybe<H> x, In<H> gradient) {
  return given(host.view(x)) ? host.view(gradient) : Tensor{};
}

template <class H, class X>
State state(H& host, const X& max, const X& norm, const X& mean) {
  return {host.view(max), host.view(norm), host.view(mean)};
}

}  // namespace latte::operators
