// SPDX-License-Identifier: Apache-2.0
// Written by `python -m latte_ext bench --device cuda --tune FILE`. Until a GPU has measured it,
// computed: two blocks on each of the 132 multiprocessors of an H100.
#pragma once

#include "latte/cuda.h"

namespace latte::cuda {

inline constexpr Tuning kTuned = {264, 256};

}  // namespace latte::cuda
