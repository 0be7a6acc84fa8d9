// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "problem.h"

namespace testing_latte {
namespace {

// CUDA has no float64 here.
void check(const std::vector<Case>& cases) {
  for (const Case& c : cases)
    if (!kTestsCuda || c.q_type != DType::float64) Call(c).check_forward();
}

TEST(Forward, Sizes) { check(size_cases()); }
TEST(Forward, Tokens) { check(token_cases()); }
TEST(Forward, MixedTypes) { check(mixed_type_cases()); }
TEST(Forward, Layouts) { check(layout_cases()); }
TEST(Forward, Events) { check(event_cases()); }
TEST(Forward, Packed) { check(packed_cases()); }
TEST(Forward, GroupedHeads) { check(group_cases()); }
TEST(Forward, OddCases) { check(odd_cases()); }

}  // namespace
}  // namespace testing_latte
