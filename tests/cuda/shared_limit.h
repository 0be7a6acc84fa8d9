// SPDX-License-Identifier: Apache-2.0
// A device with other shared memory, for the life of the object.
#pragma once

#include "cuda/emulation/cuda_emulation.h"

namespace testing_latte {

class SharedLimit {
 public:
  explicit SharedLimit(int64_t bytes) : before_(latte::emulation::options().shared_bytes) {
    latte::emulation::options().shared_bytes = static_cast<int>(bytes);
  }
  ~SharedLimit() { latte::emulation::options().shared_bytes = before_; }
  SharedLimit(const SharedLimit&) = delete;
  SharedLimit& operator=(const SharedLimit&) = delete;

 private:
  const int before_;
};

}  // namespace testing_latte
