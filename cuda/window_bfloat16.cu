// SPDX-License-Identifier: Apache-2.0
#include "cuda/window_launch.cuh"

namespace latte::cuda {

template void launch_window<__nv_bfloat16>(WindowKernel, const WindowArgs&, int64_t, void*);

}  // namespace latte::cuda
