// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>

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

// dq gains scale d softmax(scale q), whatever the masks, the grouping and the cuts.
void check_log_sum(const Case& c) {
  SCOPED_TRACE(c.text());
  Call call(c);
  call.backward();
  const int64_t rows = c.batch * c.heads * c.tokens;
  std::vector<double> before(rows * c.latents);
  for (int64_t i = 0; i < call.dq.size(); ++i) before[i] = call.dq.get(i);
  Array d(c.compute_type(), {c.batch, c.heads, c.tokens});
  call.fill(d);
  latte::LatentAttentionBackward p = call.backward_params();
  p.d_log_sum = d.tensor();
  run(p, c.threads);
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (int64_t l = 0; l < c.latents; ++l)
      sum += std::exp(c.scale * call.q.get(row * c.latents + l));
    for (int64_t l = 0; l < c.latents; ++l) {
      const int64_t i = row * c.latents + l;
      const double expected = c.scale * d.get(row) * std::exp(c.scale * call.q.get(i)) / sum;
      const double allowed =
          32 * unit_roundoff(c.compute_type()) * std::fmax(1, std::fabs(before[i]));
      ASSERT_NEAR(call.dq.get(i) - before[i], expected, allowed) << row << " " << l;
    }
  }
}

// In the widest type of the backend.
TEST(Backward, LogSum) {
  for (const bool causal : {true, false}) {
    Case c;
    c.set_type(kTestsCuda ? DType::float32 : DType::float64);
    c.causal = causal, c.scale = 0.7;
    c.batch = 2, c.heads = 6, c.kv_heads = 2, c.tokens = 70, c.masked = true;
    check_log_sum(c);
    // Cut among the threads, and among blocks.
    c.batch = c.heads = c.kv_heads = 1, c.tokens = kTestsCuda ? 600 : 4500, c.threads = 3;
    check_log_sum(c);
    c.tokens = 70, c.latents = 130, c.dim = 70;
    check_log_sum(c);
  }
}

}  // namespace
}  // namespace testing_latte
