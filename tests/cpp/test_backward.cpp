// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "problem.h"

namespace testing_latte {
namespace {

void check(const std::vector<Case>& cases) {
  for (const Case& c : cases) Call(c).check_backward();
}

TEST(Backward, Sizes) { check(size_cases()); }
TEST(Backward, Tokens) { check(token_cases()); }
TEST(Backward, MixedTypes) { check(mixed_type_cases()); }
TEST(Backward, Layouts) { check(layout_cases()); }
TEST(Backward, Events) { check(event_cases()); }
TEST(Backward, Packed) { check(packed_cases()); }
TEST(Backward, GroupedHeads) { check(group_cases()); }
TEST(Backward, OddCases) { check(odd_cases()); }

}  // namespace
}  // namespace testing_latte
