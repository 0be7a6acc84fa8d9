// SPDX-License-Identifier: Apache-2.0
// The kernels of latent attention by input type: one translation unit each, compiled side by side.
#pragma once

#include "cuda/attention.cuh"

namespace latte::cuda {

enum class AttentionKernel { key_summary, causal_forward, bidirectional_forward };

// E: float, __nv_bfloat16 or __half.
template <class E>
void launch_attention(AttentionKernel kernel, const AttentionArgs& args, int64_t blocks,
                      void* stream);

extern template void launch_attention<float>(AttentionKernel, const AttentionArgs&, int64_t, void*);
extern template void launch_attention<__nv_bfloat16>(AttentionKernel, const AttentionArgs&, int64_t,
                                                     void*);
extern template void launch_attention<__half>(AttentionKernel, const AttentionArgs&, int64_t,
                                              void*);

}  // namespace latte::cuda
