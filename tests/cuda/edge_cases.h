// SPDX-License-Identifier: Apache-2.0
// The widths and lengths around tiles, heads that share keys, and nothing to attend to.
#pragma once

#include "problem.h"

namespace testing_latte {

// Calls check(call) for each, of one type after another.
template <class F>
void for_each_edge(F check) {
  constexpr DType kTypes[] = {DType::float32, DType::bfloat16, DType::float16};
  int number = 0;
  struct Size {
    int64_t latents, dim;
  };
  constexpr Size kSizes[] = {{1, 256}, {256, 1}, {129, 43}, {43, 129}, {65, 65}};
  for (const Size& size : kSizes)
    for (const bool causal : {true, false})
      for (const bool hidden : {true, false}) {
        Case c;
        c.heads = 3, c.tokens = hidden ? 1 : 67;
        c.latents = size.latents, c.dim = size.dim;
        c.causal = causal, c.initial = causal && !hidden, c.masked = hidden;
        c.set_type(kTypes[number++ % 3]);
        Call call(c);
        for (int64_t i = 0; hidden && i < call.mask.size(); ++i) call.mask.set(i, 0);
        check(call);
      }
}

}  // namespace testing_latte
