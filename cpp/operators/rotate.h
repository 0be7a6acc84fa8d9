// SPDX-License-Identifier: Apache-2.0
// The operator of rotations.
#pragma once

#include "host.h"

namespace latte::operators {

struct Rotation {
  static constexpr const char* schema =
      "rotate(Tensor x, Tensor position, Tensor? rates, float base, SymInt? dim, bool interleaved, "
      "bool inverse) -> Tensor y";

  template <class H>
  static Out<H> run(H& host, In<H> x, In<H> position, Maybe<H> rates, double base,
                    std::optional<int64_t> dim, bool interleaved, bool inverse) {
    Rotate p;
    p.x = host.view(x);
    check_rank("rotate", 4, {{"x", p.x}});
    // In x's order of memory: a transposed projection stays one.
    Out<H> y = host.empty_like(x);
    p.position = host.view(position);
    p.rates = host.view(rates);
    p.y = host.view(y);
    p.base = base;
    p.dim = dim ? *dim : p.x.shape[3];
    p.interleaved = interleaved;
    p.inverse = inverse;
    host.call(rotate, cuda::rotate, p);
    return y;
  }
};

}  // namespace latte::operators
