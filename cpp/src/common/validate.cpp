// SPDX-License-Identifier: Apache-2.0
#include "common/validate.h"

#include <string>

#include "common/checker.h"

namespace latte {
namespace {

using Kind = Error::Kind;

using StateNames = const char* [3];
constexpr StateNames kState = {"state.max", "state.norm", "state.mean"};
constexpr StateNames kFinal = {"final.max", "final.norm", "final.mean"};
constexpr StateNames kDFinal = {nullptr, "d_final.norm", "d_final.mean"};
constexpr StateNames kDInitial = {nullptr, "d_initial.norm", "d_initial.mean"};
constexpr StateNames kMergeA = {"a.max", "a.norm", "a.mean"};
constexpr StateNames kMergeB = {"b.max", "b.norm", "b.mean"};
constexpr StateNames kMergeOut = {"out.max", "out.norm", "out.mean"};

class Checker : public BaseChecker {
 public:
  using BaseChecker::BaseChecker;

  // q, k and v: floating point, all float64 or none.
  bool compute_type(const Tensor& q, const Tensor& k, const Tensor& v) const {
    const Tensor* tensors[] = {&q, &k, &v};
    const char* names[] = {"q", "k", "v"};
    int doubles = 0;
    for (int i = 0; i < 3; ++i) {
      dtype(names[i], *tensors[i],
            {DType::float32, DType::bfloat16, DType::float16, DType::float64});
      doubles += tensors[i]->dtype == DType::float64;
    }
    if (doubles != 0 && doubles != 3)
      fail(Kind::type, std::string("q, k, v have dtypes ") + name_of(q.dtype) + ", " +
                           name_of(k.dtype) + ", " + name_of(v.dtype) +
                           ", expected float64 for all three or for none");
    return doubles == 3;
  }

  enum class Access { read, write };

  // `names` are those of max, norm and mean in a message; a null one is not looked at.
  void state(const StateNames& names, const State& s, const Problem& p, Access access) const {
    const DType compute = p.is_double ? DType::float64 : DType::float32;
    const Tensor* const fields[] = {&s.max, &s.norm, &s.mean};
    for (int i = 0; i < 3; ++i) {
      const char* const name = names[i];
      if (!name) continue;
      if (i == 2) {
        shape(name, *fields[i], {p.sequences, p.kv_heads, p.latents, p.dim},
              "(sequences, key/value heads, latents, channels)");
      } else {
        shape(name, *fields[i], {p.sequences, p.kv_heads, p.latents},
              "(sequences, key/value heads, latents)");
      }
      dtype(name, *fields[i], {compute});
      if (access == Access::write) writable(name, *fields[i]);
    }
  }

  void grouped(const Problem& p) const {
    if (p.heads < 1 || p.kv_heads < 1 || p.latents < 1 || p.dim < 1)
      fail(Kind::value, "q, k, v have " + std::to_string(p.heads) + " heads, " +
                            std::to_string(p.kv_heads) + " key/value heads, " +
                            std::to_string(p.latents) + " latents and " + std::to_string(p.dim) +
                            " channels, expected at least 1 of each");
    if (p.heads % p.kv_heads != 0)
      fail(Kind::value, "q has " + std::to_string(p.heads) + " heads, expected a multiple of the " +
                            std::to_string(p.kv_heads) + " heads of k");
  }

  void finite_scale(double scale) const {
    if (!(scale - scale == 0))
      fail(Kind::value, "scale is " + std::to_string(scale) + ", expected a finite number");
  }
};

bool any_state(const State& s) { return present(s.max) || present(s.norm) || present(s.mean); }

template <class Params>
Problem validate_inputs(const Checker& check, const Params& p) {
  check.rank("q", p.q, 4, "(batch, heads, tokens, latents)");
  check.rank("k", p.k, 4, "(batch, key/value heads, tokens, latents)");
  check.rank("v", p.v, 4, "(batch, key/value heads, tokens, channels)");
  Problem problem;
  problem.batch = p.q.shape[0];
  problem.heads = p.q.shape[1];
  problem.kv_heads = p.k.shape[1];
  problem.tokens = p.q.shape[2];
  problem.latents = p.q.shape[3];
  problem.dim = p.v.shape[3];
  problem.sequences = problem.batch;
  check.grouped(problem);
  check.memory("q", p.q);
  check.shape("k", p.k, {problem.batch, problem.kv_heads, problem.tokens, problem.latents},
              "(batch, key/value heads, tokens, latents) of q");
  check.shape("v", p.v, {problem.batch, problem.kv_heads, problem.tokens, problem.dim},
              "(batch, key/value heads, tokens, channels) of q and k");
  problem.is_double = check.compute_type(p.q, p.k, p.v);
  check.finite_scale(p.scale);
  if (present(p.key_mask)) {
    check.dtype("key_mask", p.key_mask, {DType::boolean});
    check.shape("key_mask", p.key_mask, {problem.batch, problem.tokens}, "(batch, tokens)");
  }
  if (present(p.cu_seqlens)) {
    problem.packed = true;
    problem.sequences = check.sequences(p.cu_seqlens, "q", problem.batch, problem.tokens);
  }
  if (any_state(p.initial)) {
    if (!p.causal)
      check.fail(Kind::value, "got an initial state with causal=False, expected causal=True");
    check.state(kState, p.initial, problem, Checker::Access::read);
  }
  return problem;
}

}  // namespace

void validate_threads(const char* op, int threads) {
  if (threads < 1)
    Checker(op).fail(Kind::value,
                     "threads is " + std::to_string(threads) + ", expected at least 1");
}

Problem validate(const LatentAttentionForward& p) {
  const Checker check("latent_attention");
  const Problem problem = validate_inputs(check, p);
  check.shape("y", p.y, {problem.batch, problem.heads, problem.tokens, problem.dim},
              "(batch, heads, tokens, channels)");
  check.dtype("y", p.y, {p.v.dtype});
  check.writable("y", p.y);
  if (any_state(p.final)) check.state(kFinal, p.final, problem, Checker::Access::write);
  return problem;
}

Problem validate(const LatentAttentionBackward& p) {
  const Checker check("latent_attention_backward");
  const Problem problem = validate_inputs(check, p);
  check.shape("dy", p.dy, {problem.batch, problem.heads, problem.tokens, problem.dim},
              "(batch, heads, tokens, channels)");
  check.dtype("dy", p.dy, {p.v.dtype});
  const auto gradient = [&](const char* name, const Tensor& of, const Tensor& t) {
    check.shape(name, t, {of.shape[0], of.shape[1], of.shape[2], of.shape[3]},
                "the shape of its input");
    check.dtype(name, t, {of.dtype});
    check.writable(name, t);
  };
  gradient("dq", p.q, p.dq);
  gradient("dk", p.k, p.dk);
  gradient("dv", p.v, p.dv);
  if (any_state(p.d_final)) check.state(kDFinal, p.d_final, problem, Checker::Access::read);
  if (any_state(p.d_initial)) {
    if (!any_state(p.initial))
      check.fail(Kind::value, "got d_initial without an initial state, expected both or neither");
    check.state(kDInitial, p.d_initial, problem, Checker::Access::write);
  }
  return problem;
}

Problem validate(const LatentAttentionStep& p) {
  const Checker check("latent_attention_step");
  check.rank("q", p.q, 3, "(sequences, heads, latents)");
  check.rank("k", p.k, 3, "(sequences, key/value heads, latents)");
  check.rank("v", p.v, 3, "(sequences, key/value heads, channels)");
  Problem problem;
  problem.batch = problem.sequences = p.q.shape[0];
  problem.heads = p.q.shape[1];
  problem.kv_heads = p.k.shape[1];
  problem.tokens = 1;
  problem.latents = p.q.shape[2];
  problem.dim = p.v.shape[2];
  check.grouped(problem);
  check.memory("q", p.q);
  check.shape("k", p.k, {problem.batch, problem.kv_heads, problem.latents},
              "(sequences, key/value heads, latents) of q");
  check.shape("v", p.v, {problem.batch, problem.kv_heads, problem.dim},
              "(sequences, key/value heads, channels) of q and k");
  problem.is_double = check.compute_type(p.q, p.k, p.v);
  check.finite_scale(p.scale);
  check.shape("y", p.y, {problem.batch, problem.heads, problem.dim},
              "(sequences, heads, channels)");
  check.dtype("y", p.y, {p.v.dtype});
  check.writable("y", p.y);
  check.state(kState, p.state, problem, Checker::Access::write);
  return problem;
}

Problem validate(const StateMerge& p) {
  const Checker check("state_merge");
  check.rank("a.mean", p.a.mean, 4, "(sequences, key/value heads, latents, channels)");
  check.dtype("a.mean", p.a.mean, {DType::float32, DType::float64});
  Problem problem;
  problem.batch = problem.sequences = p.a.mean.shape[0];
  problem.heads = problem.kv_heads = p.a.mean.shape[1];
  problem.latents = p.a.mean.shape[2];
  problem.dim = p.a.mean.shape[3];
  problem.is_double = p.a.mean.dtype == DType::float64;
  check.state(kMergeA, p.a, problem, Checker::Access::read);
  check.state(kMergeB, p.b, problem, Checker::Access::read);
  check.state(kMergeOut, p.out, problem, Checker::Access::write);
  return problem;
}

}  // namespace latte
