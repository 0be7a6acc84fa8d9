// SPDX-License-Identifier: Apache-2.0
// Launches of blocks whose shared memory has one stage of input or two.
#pragma once

#include <string>

#include "cuda/attention_plan.h"
#include "cuda/call.h"

namespace latte::cuda {

// As many as the current device has room for.
inline int device_stages(const char* op, int64_t stage_bytes, int64_t other_bytes) {
  const int64_t limit = device_limits().shared_bytes;
  const int count = stages(stage_bytes, other_bytes, limit);
  if (count == 0)
    throw Error(Error::Kind::runtime, std::string("[") + op + "] needs " +
                                          std::to_string(stage_bytes + other_bytes) +
                                          " bytes of shared memory per block, expected at most " +
                                          std::to_string(limit) + " on this device");
  return count;
}

// Args are AttentionArgs or more.
template <class Shape, class Args>
void launch_shape(const char* op, void (*kernel)(Args), Args args, int64_t blocks, void* stream) {
  constexpr SharedBytes kBytes = Shape::kBytes;
  args.stages = device_stages(op, kBytes.stage, kBytes.other());
  launch_blocks(op, kernel, blocks, kAttentionThreads, kBytes.total(args.stages), stream, args);
}

}  // namespace latte::cuda
