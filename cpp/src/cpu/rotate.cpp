// SPDX-License-Identifier: Apache-2.0
// Rotations as tasks, one per sequence and block of tokens: all heads of a token share its angles.
#include <cmath>

#include "common/validate.h"
#include "common/validate_rotate.h"
#include "cpu/heuristics.h"
#include "cpu/parallel.h"
#include "cpu/rotate_task.h"
#include "cpu/views.h"
#include "latte/latte.h"

namespace latte {
namespace {

using cpu::RotateTask;

// Workspace: the rates as doubles, then a table per thread.
class Plan {
 public:
  Plan(const Rotate& params, int threads) : p_(params), problem_(validate(params)) {
    validate_threads("rotate", threads);
    const RotateProblem& p = problem_;
    const double numbers = static_cast<double>(p.batch) * static_cast<double>(p.heads) *
                           static_cast<double>(p.tokens) * static_cast<double>(p.channels);
    threads_ = cpu::useful_threads(8.0 * numbers, cpu::kThreaded ? threads : 1);
    const int64_t bytes = element_size(p_.y.dtype);
    blocks_ = (p.tokens + cpu::kRotateTokens - 1) / cpu::kRotateTokens;
    stream_ = p.batch * p.heads * p.tokens * p.channels * bytes >= cpu::kStreamBytes;
    rates_ = cpu::round_to_alignment(cpu::padded_pairs(p.pairs) * 8);
    table_ = cpu::round_to_alignment(cpu::kernels().rotate_bytes(p.is_double, task(0, 0, nullptr)));
  }

  int64_t bytes() const { return rates_ + threads_ * table_; }

  void run(char* base) const {
    auto* const rates = reinterpret_cast<double*>(base);
    for (int64_t i = 0; i < cpu::padded_pairs(problem_.pairs); ++i)
      rates[i] = i < problem_.pairs ? rate(i) : 0;
    cpu::parallel_for(problem_.batch * blocks_, threads_, [&](int64_t i, int thread) {
      cpu::kernels().rotate(problem_.is_double, task(i / blocks_, i % blocks_, rates),
                            base + rates_ + thread * table_);
    });
  }

 private:
  double rate(int64_t i) const {
    if (!present(p_.rates))
      return std::pow(p_.base, -static_cast<double>(2 * i) / static_cast<double>(p_.dim));
    const void* const element = cpu::at(p_.rates, i * p_.rates.stride[0]);
    return p_.rates.dtype == DType::float64
               ? *static_cast<const double*>(element)
               : static_cast<double>(*static_cast<const float*>(element));
  }

  RotateTask task(int64_t batch, int64_t block, const double* rates) const {
    const int64_t first = block * cpu::kRotateTokens, left = problem_.tokens - first;
    const Tensor& position = p_.position;
    const int64_t stride_b = position.rank == 2 ? position.stride[0] : 0;
    RotateTask t;
    t.tokens = left < cpu::kRotateTokens ? left : cpu::kRotateTokens;
    t.heads = problem_.heads;
    t.channels = problem_.channels;
    t.pairs = problem_.pairs;
    t.position_stride = position.stride[position.rank - 1];
    t.position =
        static_cast<const int64_t*>(position.data) + batch * stride_b + first * t.position_stride;
    t.rates = rates;
    t.x = cpu::rows_of(p_.x, batch, 0, first);
    t.y = cpu::rows_of(p_.y, batch, 0, first);
    t.interleaved = p_.interleaved;
    t.inverse = p_.inverse;
    t.stream = stream_;
    return t;
  }

  const Rotate& p_;
  RotateProblem problem_;
  int threads_ = 1;
  int64_t blocks_ = 0, rates_ = 0, table_ = 0;
  bool stream_ = false;
};

}  // namespace

int64_t workspace_bytes(const Rotate& params, int threads) {
  return Plan(params, threads).bytes() + cpu::kAlignment;
}
void rotate(const Rotate& params, void* workspace, int threads) {
  const Plan plan(params, threads);
  plan.run(cpu::workspace_base(workspace, "rotate"));
}

}  // namespace latte
