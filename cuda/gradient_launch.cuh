// SPDX-License-Identifier: Apache-2.0
// Sizes of a backward pass become the template arguments of its kernels.
#pragma once

#include "cuda/call.h"
#include "cuda/gradient_keys.cuh"
#include "cuda/gradient_launch.h"
#include "cuda/gradient_queries.cuh"

namespace latte::cuda {

template <class Shape, class Kernel>
void launch_gradient_blocks(Kernel kernel, const GradientArgs& args, int64_t blocks, void* stream) {
  launch_blocks("latent_attention_backward", kernel, blocks, kAttentionThreads, Shape::kSharedBytes,
                stream, args);
}

template <class E, int kLatents>
void launch_gradient_of(GradientKernel kernel, const GradientArgs& args, int64_t blocks,
                        void* stream) {
  constexpr int kRows = kQueries | kOutputs | kState, kColumns = kKeys | kState;
  constexpr int kDim = kGradientChannels;
  switch (kernel) {
    case GradientKernel::causal_queries: {
      using Shape = KernelShape<E, kLatents, kDim, kRows | kKeys>;
      return launch_gradient_blocks<Shape>(query_gradient<Shape>, args, blocks, stream);
    }
    case GradientKernel::causal_query_sums: {
      using Shape = KernelShape<E, kLatents, kDim, kRows | kKeys | kSum>;
      return launch_gradient_blocks<Shape>(query_gradient<Shape>, args, blocks, stream);
    }
    case GradientKernel::bidirectional_queries: {
      using Shape = KernelShape<E, kLatents, kDim, kRows | kSum>;
      return launch_gradient_blocks<Shape>(query_gradient<Shape>, args, blocks, stream);
    }
    case GradientKernel::causal_keys: {
      using Shape = KernelShape<E, kLatents, kDim, kColumns | kOutputs | kFactors>;
      return launch_gradient_blocks<Shape>(key_gradient<Shape>, args, blocks, stream);
    }
    case GradientKernel::bidirectional_keys: {
      using Shape = KernelShape<E, kLatents, kDim, kColumns>;
      return launch_gradient_blocks<Shape>(key_gradient<Shape>, args, blocks, stream);
    }
  }
}

template <class E>
void launch_gradient(GradientKernel kernel, const GradientArgs& args, int latents, int64_t blocks,
                     void* stream) {
  if (latents == 16) return launch_gradient_of<E, 16>(kernel, args, blocks, stream);
  if (latents == 32) return launch_gradient_of<E, 32>(kernel, args, blocks, stream);
  launch_gradient_of<E, 64>(kernel, args, blocks, stream);
}

}  // namespace latte::cuda
