// SPDX-License-Identifier: Apache-2.0
#include "cuda/gradient_launch.cuh"

namespace latte::cuda {

template void launch_gradient<__nv_bfloat16>(GradientKernel, const GradientArgs&, int, int64_t,
                                             void*);

}  // namespace latte::cuda
