// SPDX-License-Identifier: Apache-2.0
#include <latte/latte.h>

#include <cstdio>
#include <vector>

// y of one token is its value, through the installed header and library; errors arrive as such.
int main() {
  static_assert(__cplusplus >= 201703L, "the target asks for C++17");
  float logit = 3.0f, value = 2.0f, y = 0.0f;
  latte::LatentAttentionForward params;
  const auto one = [](float* data) {
    return latte::Tensor{data, latte::DType::float32, 4, {1, 1, 1, 1}, {1, 1, 1, 1}};
  };
  params.q = params.k = one(&logit);
  params.v = one(&value);
  params.y = one(&y);
  std::vector<char> workspace(static_cast<size_t>(latte::workspace_bytes(params, 1)));
  latte::latent_attention_forward(params, workspace.data(), 1);
  try {
    params.y.rank = 3;
    latte::workspace_bytes(params, 1);
    return 1;
  } catch (const latte::Error& error) {
    std::printf("latte %s on %s: y = %g; %s\n", latte::version(), latte::cpu_isa(), y,
                error.what());
  }
  return y == 2.0f ? 0 : 1;
}
