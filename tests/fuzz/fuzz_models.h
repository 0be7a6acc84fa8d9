// SPDX-License-Identifier: Apache-2.0
// Models small enough for thousands of cases a second.
#pragma once

#include <vector>

#include "engine_models.h"

namespace testing_latte {

inline std::vector<ModelSizes> fuzzed_sizes() {
  std::vector<ModelSizes> all = all_sizes();
  for (ModelSizes& sizes : all) sizes.vocab = 3, sizes.width = 4, sizes.layers = 1;
  return all;
}

// With every part that a state can have but the convolution's.
inline engine::SafeTensors fuzzed_model() { return make_model(fuzzed_sizes()[4]); }

}  // namespace testing_latte
