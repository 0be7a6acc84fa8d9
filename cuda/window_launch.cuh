// SPDX-License-Identifier: Apache-2.0
// Sizes of a call become the template arguments of its kernel.
#pragma once

#include "cuda/attention_blocks.h"
#include "cuda/window_backward.cuh"
#include "cuda/window_forward.cuh"
#include "cuda/window_launch.h"

namespace latte::cuda {

template <class E, int kChannels>
void launch_window_sized(WindowKernel kernel, const WindowArgs& args, int64_t blocks,
                         void* stream) {
  using Forward = WindowShape<E, kChannels, 1>;
  using Gradient = WindowShape<E, kChannels, 2>;
  const auto start = [&](auto function, const WindowBytes& bytes) {
    constexpr const char* kOp = "sliding_window_attention";
    WindowArgs a = args;
    a.stages = device_stages(kOp, bytes.stage, bytes.own);
    launch_blocks(kOp, function, blocks, kAttentionThreads, bytes.total(a.stages), stream, a);
  };
  switch (kernel) {
    case WindowKernel::forward:
      return start(window_forward<Forward>, Forward::kBytes);
    case WindowKernel::query_gradient:
      return start(window_query_gradient<Gradient>, Gradient::kBytes);
    case WindowKernel::key_gradient:
      return start(window_key_gradient<Gradient>, Gradient::kBytes);
    case WindowKernel::sink_gradient:
      return start(window_sink_gradient<Gradient>, Gradient::kBytes);
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
