// SPDX-License-Identifier: Apache-2.0
#include <string>

#include "common/validate.h"
#include "cuda/call.h"
#include "cuda/step.cuh"
#include "latte/cuda.h"

namespace latte::cuda {
namespace {

constexpr const char* kOp = "latent_attention_step";

Problem validate_step(const LatentAttentionStep& params) {
  const Problem problem = validate(params);
  if (problem.latents > kMaxStepLatents)
    throw Error(Error::Kind::value, std::string("[") + kOp + "] q has " +
                                        std::to_string(problem.latents) +
                                        " latents, expected at most " +
                                        std::to_string(kMaxStepLatents) + " on a CUDA device");
  return problem;
}

template <class T>
void run(const StepParams& p, bool wide, void* stream) {
  launch_blocks(kOp, wide ? step<T, kVectorBytes / sizeof(T)> : step<T, 1>, p.heads * p.slices,
                dim3(kStepThreads), StepShared<T>::bytes(p.latents), stream, p);
  if (p.slices > 1)
    launch_blocks(kOp, step_normalisers<T>, ceil_div(p.heads * p.latents, kStepThreads),
                  dim3(kStepThreads), 0, stream, p);
}

}  // namespace

int64_t workspace_bytes(const LatentAttentionStep& params) {
  validate_step(params);
  return 0;
}

void latent_attention_step(const LatentAttentionStep& params, void* /*workspace*/, void* stream) {
  const Problem problem = validate_step(params);
  StepParams p;
  p.q = rows_of(params.q), p.k = rows_of(params.k);
  p.v = rows_of(params.v), p.y = rows_of(params.y);
  p.state = view_of(params.state);
  p.kv_heads = problem.kv_heads, p.group = problem.heads / problem.kv_heads;
  p.latents = problem.latents, p.dim = problem.dim;
  p.heads = problem.sequences * problem.kv_heads;
  p.slices = step_slices(p.heads, p.latents, p.dim);
  p.scale = params.scale;
  const bool wide = aligned(params.state.mean, kVectorBytes) &&
                    p.dim * element_size(params.state.mean.dtype) % kVectorBytes == 0;
  with_compute_type(problem.is_double,
                    [&](auto type) { run<typename decltype(type)::type>(p, wide, stream); });
}

}  // namespace latte::cuda
