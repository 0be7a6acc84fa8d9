// SPDX-License-Identifier: Apache-2.0
// Calls in a workspace of no byte more than they asked for.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "backend.h"

namespace testing_latte {

// Runs a call in a workspace of exactly the promised size, poisoned, at an odd address.
template <class Params>
void run(Function<Params> function, const Params& params, int threads) {
  const int64_t bytes = workspace_size(params, threads);
  std::vector<unsigned char> memory(bytes + 512, 0xFF);
  call(function, params, memory.data() + 257, threads);
  for (int64_t i = 0; i < static_cast<int64_t>(memory.size()); ++i)
    if ((i < 257 || i >= 257 + bytes) && memory[i] != 0xFF)
      FAIL() << "workspace of " << bytes << " bytes written at byte " << i - 257;
}

}  // namespace testing_latte
