// SPDX-License-Identifier: Apache-2.0
// The GPU backend of a build without CUDA.
#include "latte/latte.h"

namespace latte {

bool cuda_built() { return false; }

}  // namespace latte
