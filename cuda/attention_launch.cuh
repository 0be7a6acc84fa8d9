// SPDX-License-Identifier: Apache-2.0
// Sizes of a call become the template arguments of its kernel.
#pragma once

#include "cuda/attention_launch.h"
#include "cuda/bidirectional.cuh"
#include "cuda/call.h"
#include "cuda/causal.cuh"

namespace latte::cuda {

template <class E, int kLatents>
void launch_sized(AttentionKernel kernel, const AttentionArgs& args, int64_t blocks, void* stream) {
  constexpr const char* kOp = "latent_attention";
  constexpr int kDim = value_slice(kLatents, std::is_same_v<E, __nv_bfloat16>);
  switch (kernel) {
    case AttentionKernel::key_summary: {
      using Shape = KernelShape<E, kLatents, kDim, kKeys>;
      return launch_blocks(kOp, key_summary<Shape>, blocks, kAttentionThreads, Shape::kSharedBytes,
                           stream, args);
    }
    case AttentionKernel::causal_forward: {
      using Shape = KernelShape<E, kLatents, kDim, kKeys | kQueries | kState>;
      return launch_blocks(kOp, causal_forward<Shape>, blocks, kAttentionThreads,
                           Shape::kSharedBytes, stream, args);
    }
    case AttentionKernel::bidirectional_forward: {
      using Shape = KernelShape<E, kLatents, kDim, kQueries | kState>;
      return launch_blocks(kOp, bidirectional_forward<Shape>, blocks, kAttentionThreads,
                           Shape::kSharedBytes, stream, args);
    }
  }
}

template <class E>
void launch_attention(AttentionKernel kernel, const AttentionArgs& args, int64_t blocks,
                      void* stream) {
  switch (latent_tile(args.latents)) {
    case 16:
      return launch_sized<E, 16>(kernel, args, blocks, stream);
    case 32:
      return launch_sized<E, 32>(kernel, args, blocks, stream);
    case 64:
      return launch_sized<E, 64>(kernel, args, blocks, stream);
    case 128:
      return launch_sized<E, 128>(kernel, args, blocks, stream);
    default:
      return launch_sized<E, 256>(kernel, args, blocks, stream);
  }
}

}  // namespace latte::cuda
