// SPDX-License-Identifier: Apache-2.0
// Cases that values and gradients have in common.
#pragma once

#include "problem.h"

namespace testing_latte {

// The widths and lengths around tiles, heads that share keys, and nothing to attend to: check(call)
// for each, of one type after another.
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

// A jump of the maximum hides behind a key that is not there: that row sees the state before the
// chunk alone.
template <class F>
void for_each_hidden_jump(F check) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
    for (const bool masked : {true, false}) {
      Case c;
      c.tokens = 130, c.latents = 6, c.dim = 7, c.initial = true, c.masked = masked;
      c.set_type(dtype);
      Call call(c);
      for (int64_t t = 64; t < c.tokens; ++t) {
        if (masked) call.mask.set(t, t > 65);
        for (int64_t i = t * c.latents; i < (t + 1) * c.latents; ++i)
          call.k.set(i, t > 65 ? i % 7 + 200.0 : -kInfinity);
        for (int64_t i = t * c.dim; i < (t + 1) * c.dim; ++i) call.v.set(i, i % 5 - 2.0);
      }
      check(call);
    }
}

}  // namespace testing_latte
