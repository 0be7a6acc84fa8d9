// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "latte/latte.h"

namespace latte {

// Bytes of an element.
constexpr int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64:
      return 8;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::boolean:
      return 1;
    default:
      return 2;
  }
}

}  // namespace latte
