// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <string>

#include "cuda/tuned.h"

namespace latte::cuda {
namespace {

std::atomic<int64_t> wanted_blocks{kTuned.wanted_blocks};
std::atomic<int64_t> min_segment_tokens{kTuned.min_segment_tokens};

}  // namespace

Tuning tuning() { return {wanted_blocks, min_segment_tokens}; }

void set_tuning(const Tuning& tuning) {
  if (tuning.wanted_blocks < 1 || tuning.min_segment_tokens < 1)
    throw Error(Error::Kind::value,
                "[cuda] tuning has wanted_blocks " + std::to_string(tuning.wanted_blocks) +
                    " and min_segment_tokens " + std::to_string(tuning.min_segment_tokens) +
                    ", expected positive numbers");
  wanted_blocks = tuning.wanted_blocks;
  min_segment_tokens = tuning.min_segment_tokens;
}

}  // namespace latte::cuda
