// SPDX-License-Identifier: Apache-2.0
#include "common/validate_rotate.h"

#include <cmath>
#include <string>

#include "common/checker.h"

namespace latte {

RotateProblem validate(const Rotate& p) {
  using Kind = Error::Kind;
  constexpr const char* kAxes = "(batch, heads, tokens, channels)";
  const BaseChecker check("rotate");

  check.rank("x", p.x, 4, kAxes);
  check.dtype("x", p.x, {DType::float32, DType::bfloat16, DType::float16, DType::float64});
  check.memory("x", p.x);
  RotateProblem problem;
  problem.batch = p.x.shape[0];
  problem.heads = p.x.shape[1];
  problem.tokens = p.x.shape[2];
  problem.channels = p.x.shape[3];
  problem.is_double = p.x.dtype == DType::float64;
  if (p.dim % 2 != 0 || p.dim < 0 || p.dim > problem.channels)
    check.fail(Kind::value, "dim is " + std::to_string(p.dim) + ", expected an even number of at " +
                                "most " + std::to_string(problem.channels) + " channels");
  problem.pairs = p.dim / 2;

  check.dtype("position", p.position, {DType::int64});
  if (p.position.rank == 2) {
    check.shape("position", p.position, {problem.batch, problem.tokens}, "(batch, tokens)");
  } else {
    check.shape("position", p.position, {problem.tokens}, "(tokens,)");
  }
  if (present(p.rates)) {
    check.dtype("rates", p.rates, {DType::float32, DType::float64});
    check.shape("rates", p.rates, {problem.pairs}, "(dim / 2,)");
  } else if (!(p.base > 0 && std::isfinite(p.base))) {
    check.fail(Kind::value, "base is " + std::to_string(p.base) + ", expected a positive number");
  }

  check.shape("y", p.y, {problem.batch, problem.heads, problem.tokens, problem.channels}, kAxes);
  check.dtype("y", p.y, {p.x.dtype});
  check.writable("y", p.y);
  return problem;
}

}  // namespace latte
