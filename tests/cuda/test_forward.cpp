// SPDX-License-Identifier: Apache-2.0
// Latent attention forward on the emulated device, against the float64 oracle of tests/cpp.
#include <gtest/gtest.h>

#include "emulation/cuda_emulation.h"
#include "problem.h"

namespace testing_latte {
namespace {

namespace emulation = latte::emulation;

constexpr DType kDeviceTypes[] = {DType::float32, DType::bfloat16, DType::float16};

void check(const std::vector<Case>& cases) {
  for (const Case& c : cases)
    if (c.q_type != DType::float64) Call(c).check_forward();
}

// The CPU's cases.
TEST(Forward, Sizes) { check(size_cases()); }
TEST(Forward, Tokens) { check(token_cases()); }
TEST(Forward, MixedTypes) { check(mixed_type_cases()); }
TEST(Forward, Layouts) { check(layout_cases()); }
TEST(Forward, Events) { check(event_cases()); }
TEST(Forward, Packed) { check(packed_cases()); }
TEST(Forward, GroupedHeads) { check(group_cases()); }
TEST(Forward, OddCases) { check(odd_cases()); }

// Every kernel, with whole tiles and vectors and without.
TEST(Forward, Tiles) {
  unsigned seed = 0;
  for (const DType dtype : kDeviceTypes)
    for (const int64_t latents : {16, 32, 64, 101, 128, 250, 256})
      for (const int64_t dim : {16, 64, 90, 128})
        for (const bool causal : {true, false}) {
          Case c;
          c.tokens = seed % 3 ? 65 : 130, c.latents = latents, c.dim = dim;
          c.causal = causal, c.initial = causal && seed % 2, c.seed = ++seed;
          c.set_type(dtype);
          Call(c).check_forward();
        }
}

}  // namespace
}  // namespace testing_latte
