// SPDX-License-Identifier: Apache-2.0
// The kernels of window attention by input type: one translation unit each.
#pragma once

#include "cuda/window.cuh"

namespace latte::cuda {

enum class WindowKernel { forward, query_gradient, key_gradient, sink_gradient };

// E: float, __nv_bfloat16 or __half.
template <class E>
void launch_window(WindowKernel kernel, const WindowArgs& args, int64_t blocks, void* stream);

extern template void launch_window<float>(WindowKernel, const WindowArgs&, int64_t, void*);
extern template void launch_window<__nv_bfloat16>(WindowKernel, const WindowArgs&, int64_t, void*);
extern template void launch_window<__half>(WindowKernel, const WindowArgs&, int64_t, void*);

}  // namespace latte::cuda
