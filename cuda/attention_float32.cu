// SPDX-License-Identifier: Apache-2.0
#include "cuda/attention_launch.cuh"

namespace latte::cuda {

template void launch_attention<float>(AttentionKernel, const AttentionArgs&, int, int64_t, void*);

}  // namespace latte::cuda
