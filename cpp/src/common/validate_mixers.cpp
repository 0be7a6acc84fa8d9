// SPDX-License-Identifier: Apache-2.0
#include "common/validate_mixers.h"

#include <string>

#include "common/checker.h"

namespace latte {
namespace {

using Kind = Error::Kind;

constexpr const char* kAxes = "(batch, tokens, channels)";
constexpr const char* kStateAxes = "(sequences, channels)";
constexpr int64_t kMaxWidth = 8;

struct Named {
  const char* name;
  const Tensor* tensor;
};

class Checker : public BaseChecker {
 public:
  using BaseChecker::BaseChecker;

  // The sizes of x (B,T,C), called `name`.
  MixerProblem sizes(const char* name, const Tensor& x, const Tensor& cu_seqlens) const {
    rank(name, x, 3, kAxes);
    MixerProblem p;
    p.batch = p.sequences = x.shape[0];
    p.tokens = x.shape[1];
    p.channels = x.shape[2];
    if (p.channels < 1)
      fail(Kind::value, std::string(name) + " has " + std::to_string(p.channels) +
                            " channels, expected at least 1");
    memory(name, x);
    if (present(cu_seqlens)) {
      p.packed = true;
      p.sequences = sequences(cu_seqlens, name, p.batch, p.tokens);
    }
    return p;
  }

  // Floating point, and float64 for all or for none; absent ones are not looked at.
  bool compute_type(std::initializer_list<Named> tensors) const {
    int doubles = 0, count = 0;
    for (const Named& t : tensors) {
      if (!present(*t.tensor)) continue;
      dtype(t.name, *t.tensor, {DType::float32, DType::bfloat16, DType::float16, DType::float64});
      doubles += t.tensor->dtype == DType::float64;
      ++count;
    }
    if (doubles != 0 && doubles != count) {
      std::string names, types;
      for (const Named& t : tensors) {
        if (!present(*t.tensor)) continue;
        names += (names.empty() ? "" : ", ") + std::string(t.name);
        types += (types.empty() ? "" : ", ") + std::string(name_of(t.tensor->dtype));
      }
      fail(Kind::type,
           names + " have dtypes " + types + ", expected float64 for all of them or for none");
    }
    return doubles != 0;
  }

  void tokens_like(const char* name, const Tensor& t, const MixerProblem& p) const {
    shape(name, t, {p.batch, p.tokens, p.channels}, kAxes);
  }

  // An output (B,T,C) of that type, or of the compute type if `wide`.
  void output(const char* name, const Tensor& t, const MixerProblem& p, DType type,
              bool wide = false) const {
    tokens_like(name, t, p);
    if (wide) {
      dtype(name, t, {type, compute(p)});
    } else {
      dtype(name, t, {type});
    }
    writable(name, t);
  }

  enum class Access { read, write };
  void state(const char* name, const Tensor& t, const MixerProblem& p, Access access) const {
    if (!present(t)) return;
    shape(name, t, {p.sequences, p.channels}, kStateAxes);
    dtype(name, t, {compute(p)});
    if (access == Access::write) writable(name, t);
  }

  // The inputs around a convolution.
  void tail(const char* name, const Tensor& t, const MixerProblem& p, DType type,
            Access access) const {
    if (!present(t)) return;
    shape(name, t, {p.sequences, p.width - 1, p.channels}, "(sequences, width - 1, channels)");
    dtype(name, t, {type});
    if (access == Access::write) writable(name, t);
  }

  static DType compute(const MixerProblem& p) {
    return p.is_double ? DType::float64 : DType::float32;
  }
};

using Access = Checker::Access;

template <class Params>
MixerProblem rg_lru_inputs(const Checker& check, const Params& p) {
  MixerProblem problem = check.sizes("x", p.x, p.cu_seqlens);
  check.tokens_like("gate_a", p.gate_a, problem);
  check.tokens_like("gate_x", p.gate_x, problem);
  check.shape("log_lambda", p.log_lambda, {problem.channels}, "(channels,)");
  problem.is_double = check.compute_type(
      {{"x", &p.x}, {"gate_a", &p.gate_a}, {"gate_x", &p.gate_x}, {"log_lambda", &p.log_lambda}});
  if (present(p.key_mask)) {
    check.dtype("key_mask", p.key_mask, {DType::boolean});
    check.shape("key_mask", p.key_mask, {problem.batch, problem.tokens}, "(batch, tokens)");
  }
  check.state("h0", p.initial, problem, Access::read);
  if (present(p.fresh)) {
    if (!present(p.initial))
      check.fail(Kind::value, "got fresh without h0, expected both or neither");
    check.dtype("fresh", p.fresh, {DType::boolean});
    check.shape("fresh", p.fresh, {problem.sequences}, "(sequences,)");
  }
  return problem;
}

template <class Params>
MixerProblem short_conv_inputs(const Checker& check, const Params& p) {
  MixerProblem problem = check.sizes("x", p.x, p.cu_seqlens);
  check.rank("weight", p.weight, 2, "(channels, width)");
  problem.width = p.weight.shape[1];
  if (problem.width < 1 || problem.width > kMaxWidth)
    check.fail(Kind::value, "weight has width " + std::to_string(problem.width) +
                                ", expected 1 to " + std::to_string(kMaxWidth));
  check.shape("weight", p.weight, {problem.channels, problem.width}, "(channels, width)");
  if (present(p.initial)) {
    if (!p.causal) check.fail(Kind::value, "got state with causal=False, expected causal=True");
    check.tail("state", p.initial, problem, p.x.dtype, Access::read);
  }
  return problem;
}

}  // namespace

MixerProblem validate(const LinearRecurrenceForward& p, Memory memory) {
  const Checker check("linear_recurrence", memory);
  MixerProblem problem = check.sizes("a", p.a, p.cu_seqlens);
  check.tokens_like("b", p.b, problem);
  problem.is_double = check.compute_type({{"a", &p.a}, {"b", &p.b}});
  check.state("h0", p.initial, problem, Access::read);
  check.output("h", p.h, problem, p.b.dtype, true);
  check.state("final", p.final, problem, Access::write);
  return problem;
}

MixerProblem validate(const LinearRecurrenceBackward& p, Memory memory) {
  const Checker check("linear_recurrence_backward", memory);
  MixerProblem problem = check.sizes("a", p.a, p.cu_seqlens);
  check.tokens_like("h", p.h, problem);
  check.tokens_like("dh", p.dh, problem);
  problem.is_double = check.compute_type({{"a", &p.a}, {"h", &p.h}, {"dh", &p.dh}});
  check.state("h0", p.initial, problem, Access::read);
  check.state("d_final", p.d_final, problem, Access::read);
  check.output("da", p.da, problem, p.a.dtype);
  check.output("db", p.db, problem, p.dh.dtype);
  check.state("d_h0", p.d_initial, problem, Access::write);
  return problem;
}

MixerProblem validate(const RgLruForward& p, Memory memory) {
  const Checker check("rg_lru", memory);
  const MixerProblem problem = rg_lru_inputs(check, p);
  check.output("y", p.y, problem, p.x.dtype, true);
  check.state("final", p.final, problem, Access::write);
  return problem;
}

MixerProblem validate(const RgLruBackward& p, Memory memory) {
  const Checker check("rg_lru_backward", memory);
  const MixerProblem problem = rg_lru_inputs(check, p);
  check.tokens_like("y", p.y, problem);
  check.tokens_like("dy", p.dy, problem);
  check.compute_type({{"x", &p.x}, {"y", &p.y}, {"dy", &p.dy}});
  check.state("d_final", p.d_final, problem, Access::read);
  check.output("dx", p.dx, problem, p.x.dtype);
  check.output("d_gate_a", p.d_gate_a, problem, p.gate_a.dtype);
  check.output("d_gate_x", p.d_gate_x, problem, p.gate_x.dtype);
  check.shape("d_log_lambda", p.d_log_lambda, {problem.channels}, "(channels,)");
  check.dtype("d_log_lambda", p.d_log_lambda, {p.log_lambda.dtype});
  check.writable("d_log_lambda", p.d_log_lambda);
  check.state("d_h0", p.d_initial, problem, Access::write);
  return problem;
}

MixerProblem validate(const ShortConvForward& p, Memory memory) {
  const Checker check("short_conv", memory);
  MixerProblem problem = short_conv_inputs(check, p);
  if (present(p.bias)) check.shape("bias", p.bias, {problem.channels}, "(channels,)");
  problem.is_double = check.compute_type({{"x", &p.x}, {"weight", &p.weight}, {"bias", &p.bias}});
  check.output("y", p.y, problem, p.x.dtype);
  if (present(p.final) && !p.causal)
    check.fail(Kind::value, "got a final state with causal=False, expected causal=True");
  check.tail("final", p.final, problem, p.x.dtype, Access::write);
  return problem;
}

MixerProblem validate(const ShortConvBackward& p, Memory memory) {
  const Checker check("short_conv_backward", memory);
  MixerProblem problem = short_conv_inputs(check, p);
  check.tokens_like("dy", p.dy, problem);
  problem.is_double = check.compute_type({{"x", &p.x}, {"weight", &p.weight}, {"dy", &p.dy}});
  if ((present(p.d_final) || present(p.d_initial)) && !p.causal)
    check.fail(Kind::value, "got gradients of states with causal=False, expected causal=True");
  check.tail("d_final", p.d_final, problem, p.x.dtype, Access::read);
  check.output("dx", p.dx, problem, p.x.dtype);
  check.shape("d_weight", p.d_weight, {problem.channels, problem.width}, "(channels, width)");
  check.dtype("d_weight", p.d_weight, {p.weight.dtype});
  check.writable("d_weight", p.d_weight);
  if (present(p.d_bias)) {
    check.shape("d_bias", p.d_bias, {problem.channels}, "(channels,)");
    check.compute_type({{"x", &p.x}, {"d_bias", &p.d_bias}});
    check.writable("d_bias", p.d_bias);
  }
  check.tail("d_state", p.d_initial, problem, p.x.dtype, Access::write);
  return problem;
}

}  // namespace latte
