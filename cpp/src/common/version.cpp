// SPDX-License-Identifier: Apache-2.0
#include "latte/latte.h"

namespace latte {

const char* version() { return LATTE_VERSION; }

}  // namespace latte
