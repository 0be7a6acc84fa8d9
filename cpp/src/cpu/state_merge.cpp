// SPDX-License-Identifier: Apache-2.0
// The state of the union of two token sets: reference.merge, for the C++ user.
#include <cmath>

#include "common/validate.h"
#include "latte/latte.h"

namespace latte {
namespace {

template <class T>
T& element(const Tensor& t, int64_t n, int64_t h, int64_t l, int64_t d = 0) {
  const int64_t inner = t.rank == 4 ? d * t.stride[3] : 0;
  return static_cast<T*>(t.data)[n * t.stride[0] + h * t.stride[1] + l * t.stride[2] + inner];
}

template <class T>
void merge(const StateMerge& p, const Problem& problem) {
  for (int64_t n = 0; n < problem.sequences; ++n)
    for (int64_t h = 0; h < problem.kv_heads; ++h)
      for (int64_t l = 0; l < problem.latents; ++l) {
        const T a_max = element<T>(p.a.max, n, h, l), b_max = element<T>(p.b.max, n, h, l);
        const T a_norm = element<T>(p.a.norm, n, h, l), b_norm = element<T>(p.b.norm, n, h, l);
        const T max = a_max > b_max ? a_max : b_max;
        const T a_mass = a_norm == 0 ? T(0) : a_norm * std::exp(a_max - max);
        const T b_mass = b_norm == 0 ? T(0) : b_norm * std::exp(b_max - max);
        const T norm = a_mass + b_mass;
        const T share = norm == 0 ? T(0) : b_mass / norm;
        element<T>(p.out.max, n, h, l) = max;
        element<T>(p.out.norm, n, h, l) = norm;
        for (int64_t d = 0; d < problem.dim; ++d) {
          const T a = element<T>(p.a.mean, n, h, l, d), b = element<T>(p.b.mean, n, h, l, d);
          element<T>(p.out.mean, n, h, l, d) = a_norm == 0 ? b : a + share * (b - a);
        }
      }
}

}  // namespace

void state_merge(const StateMerge& params) {
  const Problem problem = validate(params);
  problem.is_double ? merge<double>(params, problem) : merge<float>(params, problem);
}

}  // namespace latte
