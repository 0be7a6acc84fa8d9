// SPDX-License-Identifier: Apache-2.0
// Sizes of a backward pass become the template arguments of its kernels.
#pragma once

#include "cuda/attention_blocks.h"
#include "cuda/gradient_keys.cuh"
#include "cuda/gradient_launch.h"
#include "cuda/gradient_queries.cuh"

namespace latte::cuda {

template <class E, int kLatents>
void launch_gradient_of(GradientKernel kernel, const GradientArgs& args, int64_t blocks,
                        void* stream) {
  constexpr const char* kOp = "latent_attention_backward";
  constexpr int kDim = kGradientChannels;
  switch (kernel) {
    case GradientKernel::causal_queries: {
      using Shape = KernelShape<E, kLatents, kDim, query_gradient_contents(kDType<E>)>;
      return launch_shape<Shape>(kOp, query_gradient<Shape>, args, blocks, stream);
    }
    case GradientKernel::causal_query_sums: {
      using Shape = KernelShape<E, kLatents, kDim, kQuerySumContents>;
      return launch_shape<Shape>(kOp, query_gradient<Shape>, args, blocks, stream);
    }
    case GradientKernel::bidirectional_queries: {
      using Shape = KernelShape<E, kLatents, kDim, kMeanGradientContents>;
      return launch_shape<Shape>(kOp, query_gradient<Shape>, args, blocks, stream);
    }
    case GradientKernel::causal_keys: {
      using Shape = KernelShape<E, kLatents, kDim, kKeyGradientContents>;
      return launch_shape<Shape>(kOp, key_gradient<Shape>, args, blocks, stream);
    }
    case GradientKernel::recalling_keys: {
      if constexpr (recalls_factors(kDType<E>)) {
        using Shape = KernelShape<E, kLatents, kDim, kRecallingContents>;
        launch_shape<Shape>(kOp, key_gradient<Shape>, args, blocks, stream);
      }
      return;
    }
    case GradientKernel::bidirectional_keys: {
      using Shape = KernelShape<E, kLatents, kDim, kMeanKeyContents>;
      return launch_shape<Shape>(kOp, key_gradient<Shape>, args, blocks, stream);
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
