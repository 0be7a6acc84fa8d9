// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstdio>

#include "latte/latte.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  try {
    std::printf("latte %s, kernels for %s\n", latte::version(), latte::cpu_isa());
  } catch (const latte::Error& error) {
    std::printf("%s\n", error.what());
    return 77;  // ctest's SKIP_RETURN_CODE: this machine lacks the instruction set
  }
  return RUN_ALL_TESTS();
}
