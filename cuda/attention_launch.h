// SPDX-License-Identifier: Apache-2.0
// The kernels of latent attention by input type: one translation unit each, compiled side by side.
#pragma once

#include "cuda/attention.cuh"

namespace latte::cuda {

enum class AttentionKernel { key_summary, causal_forward, bidirectional_forward };

// E: float, __nv_bfloat16 or __half. Blocks have so many latents each: forward_latents().
template <class E>
void launch_attention(AttentionKernel kernel, const AttentionArgs& args, int latents,
                      int64_t blocks, void* stream);

extern template void launch_attention<float>(AttentionKernel, const AttentionArgs&, int, int64_t,
                                             void*);
extern template void launch_attention<__nv_bfloat16>(AttentionKernel, const AttentionArgs&, int,
                                                     int64_t, void*);
extern template void launch_attention<__half>(AttentionKernel, const AttentionArgs&, int, int64_t,
                                              void*);

}  // namespace latte::cuda
