// SPDX-License-Identifier: Apache-2.0
#include "common/validate.h"
#include "cuda/call.h"
#include "cuda/merge.cuh"
#include "latte/cuda.h"

namespace latte::cuda {

void state_merge(const StateMerge& params, void* stream) {
  const Problem problem = validate(params);
  MergeParams p{view_of(params.a), view_of(params.b), view_of(params.out)};
  p.heads = problem.kv_heads, p.latents = problem.latents, p.dim = problem.dim;
  p.rows = problem.sequences * problem.kv_heads * problem.latents;
  with_compute_type(problem.is_double, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWide = kVectorBytes / sizeof(T);
    const bool wide = p.dim % kWide == 0 && aligned(params.a.mean, kVectorBytes) &&
                      aligned(params.b.mean, kVectorBytes) &&
                      aligned(params.out.mean, kVectorBytes);
    launch_blocks("state_merge", wide ? merge_states<T, kWide> : merge_states<T, 1>,
                  ceil_div(p.rows, kMergeThreads / 32), dim3(kMergeThreads), 0, stream, p);
  });
}

}  // namespace latte::cuda
