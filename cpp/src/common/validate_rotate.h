// SPDX-License-Identifier: Apache-2.0
// The border of rotations.
#pragma once

#include "latte/latte.h"

namespace latte {

struct RotateProblem {
  int64_t batch = 0, heads = 0, tokens = 0, channels = 0;
  int64_t pairs = 0;
  bool is_double = false;
};

RotateProblem validate(const Rotate& params);

}  // namespace latte
