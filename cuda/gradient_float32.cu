// SPDX-License-Identifier: Apache-2.0
#include "cuda/gradient_launch.cuh"

namespace latte::cuda {

template void launch_gradient<float>(GradientKernel, const GradientArgs&, int, int64_t, void*);

}  // namespace latte::cuda
