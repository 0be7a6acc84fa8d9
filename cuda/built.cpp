// SPDX-License-Identifier: Apache-2.0
// The counterpart of no_cuda.cpp in a build with CUDA.
#include "latte/latte.h"

namespace latte {

bool cuda_built() { return true; }

}  // namespace latte
