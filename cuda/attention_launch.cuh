// SPDX-License-Identifier: Apache-2.0
// Sizes of a call become the template arguments of its kernel.
#pragma once

#include "cuda/attention_blocks.h"
#include "cuda/attention_launch.h"
#include "cuda/bidirectional.cuh"
#include "cuda/causal.cuh"

namespace latte::cuda {

template <class E, int kLatents>
void launch_sized(AttentionKernel kernel, const AttentionArgs& args, int64_t blocks, void* stream) {
  constexpr const char* kOp = "latent_attention";
  constexpr int kDim = value_slice(kLatents, kDType<E>);
  switch (kernel) {
    case AttentionKernel::key_summary: {
      using Shape = KernelShape<E, kLatents, kDim, kKeys>;
      return launch_shape<Shape>(kOp, key_summary<Shape>, args, blocks, stream);
    }
    case AttentionKernel::causal_forward: {
      using Shape = KernelShape<E, kLatents, kDim, kForwardContents>;
      return launch_shape<Shape>(kOp, causal_forward<Shape>, args, blocks, stream);
    }
    case AttentionKernel::bidirectional_forward: {
      using Shape = KernelShape<E, kLatents, kDim, kMeanContents>;
      return launch_shape<Shape>(kOp, bidirectional_forward<Shape>, args, blocks, stream);
    }
  }
}

template <class E>
void launch_attention(AttentionKernel kernel, const AttentionArgs& args, int latents,
                      int64_t blocks, void* stream) {
  if constexpr (forward_latents(kMaxLatents, kDType<E>, INT64_MAX) == 256)
    if (latents == 256) return launch_sized<E, 256>(kernel, args, blocks, stream);
  switch (latents) {
    case 16:
      return launch_sized<E, 16>(kernel, args, blocks, stream);
    case 32:
      return launch_sized<E, 32>(kernel, args, blocks, stream);
    case 64:
      return launch_sized<E, 64>(kernel, args, blocks, stream);
    default:
      return launch_sized<E, 128>(kernel, args, blocks, stream);
  }
}

}  // namespace latte::cuda
