// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "common/validate.h"
#include "common/validate_rotate.h"
#include "cuda/call.h"
#include "cuda/rotate.cuh"
#include "latte/cuda.h"

namespace latte::cuda {
namespace {

// Lanes of a row: the next power of two, at most a warp.
int lanes_of(int64_t units) {
  int lanes = 1;
  while (lanes < 32 && lanes < units) lanes *= 2;
  return lanes;
}

template <class S, int N>
void launch_rows(const RotateParams& p, int64_t batch, bool interleaved, void* stream) {
  const int64_t blocks = batch * ceil_div(p.tokens, kRotateTokens) * p.groups;
  const int lanes = lanes_of(most(ceil_div(p.pairs, N), p.rest ? p.channels - 2 * p.all_pairs : 0));
  const dim3 threads(static_cast<unsigned>(lanes), static_cast<unsigned>(kRotateThreads / lanes));
  const int64_t shared =
      int64_t{kRotateTokens} * (p.pairs + kRotatePadding) * sizeof(Vector<Compute<S>, 2>);
  launch_blocks("rotate", interleaved ? rotate_rows<S, N, true> : rotate_rows<S, N, false>, blocks,
                threads, shared, stream, p);
}

RotateParams params_of(const Rotate& params, const RotateProblem& problem) {
  RotateParams p;
  p.x = view_of(params.x), p.y = view_of(params.y);
  p.position.data = params.position.data;
  p.position.stride[0] = params.position.rank == 2 ? params.position.stride[0] : 0;
  p.position.stride[1] = params.position.stride[params.position.rank - 1];
  if (present(params.rates)) {
    p.rates = params.rates.data;
    p.double_rates = params.rates.dtype == DType::float64;
    p.rate_stride = params.rates.stride[0];
  }
  p.heads = problem.heads, p.tokens = problem.tokens, p.channels = problem.channels;
  p.all_pairs = problem.pairs;
  p.inverse = params.inverse;
  const int64_t tiles = problem.batch * ceil_div(p.tokens, kRotateTokens);
  p.groups = rotate_groups(tiles, p.heads);
  return p;
}

}  // namespace

int64_t workspace_bytes(const Rotate& params) {
  validate(params);
  return 0;
}

// In launches of kRotatePairs pairs, whose rates travel as arguments: one up to 256 channels.
void rotate(const Rotate& params, void* /*workspace*/, void* stream) {
  const RotateProblem problem = validate(params);
  if (problem.heads == 0) return;
  RotateParams p = params_of(params, problem);
  do {
    p.pairs = static_cast<int>(least(problem.pairs - p.first_pair, kRotatePairs));
    p.rest = p.first_pair == 0;
    for (int i = 0; i < p.pairs; ++i)
      p.own_rates[i] = std::pow(params.base, -static_cast<double>(2 * (p.first_pair + i)) /
                                                 static_cast<double>(params.dim));
    with_type(params.x.dtype, [&](auto type) {
      using S = typename decltype(type)::type;
      constexpr int kWide = kVectorBytes / sizeof(S);
      const bool wide = problem.pairs % kWide == 0 && aligned(params.x, kVectorBytes) &&
                        aligned(params.y, kVectorBytes);
      wide ? launch_rows<S, kWide>(p, problem.batch, params.interleaved, stream)
           : launch_rows<S, 1>(p, problem.batch, params.interleaved, stream);
    });
    p.first_pair += kRotatePairs;
  } while (p.first_pair < problem.pairs);
}

}  // namespace latte::cuda
