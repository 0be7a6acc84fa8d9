// SPDX-License-Identifier: Apache-2.0
// The walks of the backward pass by input type, as attention_launch.h.
#pragma once

#include "cuda/gradient.cuh"

namespace latte::cuda {

// causal_queries sums no gradient of its own, causal_query_sums does. causal_keys reads factors,
// recalling_keys finds them again.
enum class GradientKernel {
  causal_queries,
  causal_query_sums,
  bidirectional_queries,
  causal_keys,
  recalling_keys,
  bidirectional_keys
};

// Of blocks of so many latents: gradient_latents().
template <class E>
void launch_gradient(GradientKernel kernel, const GradientArgs& args, int latents, int64_t blocks,
                     void* stream);

extern template void launch_gradient<float>(GradientKernel, const GradientArgs&, int, int64_t,
                                            void*);
extern template void launch_gradient<__nv_bfloat16>(GradientKernel, const GradientArgs&, int,
                                                    int64_t, void*);
extern template void launch_gradient<__half>(GradientKernel, const GradientArgs&, int, int64_t,
                                             void*);

}  // namespace latte::cuda
