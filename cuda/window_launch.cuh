// SPDX-License-Identifier: Apache-2.0
// Sizes of a call become the template arguments of its kernel.
#pragma once

#include "cuda/call.h"
#include "cuda/window_backward.cuh"
#include "cuda/window_forward.cuh"
#include "cuda/window_launch.h"

namespace latte::cuda {

template <class E, int kChannels>
void launch_window_sized(WindowKernel kernel, const WindowArgs& args, int64_t blocks,
                         void* stream) {
  using Forward = WindowShape<E, kChannels, 1>;
  using Gradient = WindowShape<E, kChannels, 2>;
  const auto start = [&](auto function, int64_t shared_bytes) {
    launch_blocks("sliding_window_attention", function, blocks, kAttentionThreads, shared_bytes,
                  stream, args);
  };
  switch (kernel) {
    case WindowKernel::forward:
      return start(window_forward<Forward>, Forward::kSharedBytes);
    case WindowKernel::query_gradient:
      return start(window_query_gradient<Gradient>, Gradient::kSharedBytes);
    case WindowKernel::key_gradient:
      return start(window_key_gradient<Gradient>, Gradient::kSharedBytes);
    case WindowKernel::sink_gradient:
      return start(window_sink_gradient<Gradient>, Gradient::kSharedBytes);
  }
}

template <class E>
void launch_window(WindowKernel kernel, const WindowArgs& args, int64_t blocks, void* stream) {
  switch (channel_tile(most(args.key_dim, args.dim))) {
    case 32:
      return launch_window_sized<E, 32>(kernel, args, blocks, stream);
    case 64:
      return launch_window_sized<E, 64>(kernel, args, blocks, stream);
    case 128:
      return launch_window_sized<E, 128>(kernel, args, blocks, stream);
    default:
      return launch_window_sized<E, 256>(kernel, args, blocks, stream);
  }
}

}  // namespace latte::cuda
