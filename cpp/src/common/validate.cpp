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

DType compute_dtype(bool is_double) { return is_double ? DType::float64 : DType::float32; }

class Checker : public BaseChecker {
 public:
  using BaseChecker::BaseChecker;

  // In the dtype of what it is the gradient of, or unrounded in the compute type.
  void gradient(const char* name, const Tensor& of, const Tensor& t, DType compute) const {
    shape(name, t, {of.shape[0], of.shape[1], of.shape[2], of.shape[3]}, "the shape of its input");
    dtype(name, t, {of.dtype, compute});
    writable(name, t);
  }

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
    if (access == Access::write && names[0]) apart(names[0], s.max, names[1], s.norm);
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

  // Floating point, float64 if and only if the rest is.
  void floating(const char* name, const Tensor& t, bool is_double) const {
    if (is_double) {
      dtype(name, t, {DType::float64});
    } else {
      dtype(name, t, {DType::float32, DType::bfloat16, DType::float16});
    }
  }

  // A tensor (N,) of positions.
  void positions(const char* name, const Tensor& t, int64_t sequences) const {
    shape(name, t, {sequences}, "(sequences,)");
    dtype(name, t, {DType::int64});
    for (int64_t n = 0; n < sequences && reads_values(); ++n) {
      const int64_t position = static_cast<const int64_t*>(t.data)[n * t.stride[0]];
      if (position < 0)
        fail(Kind::value, std::string(name) + "[" + std::to_string(n) + "] is " +
                              std::to_string(position) + ", expected at least 0");
    }
  }

  void softcap(double softcap) const {
    if (!(softcap >= 0 && softcap - softcap == 0))
      fail(Kind::value, "softcap is " + std::to_string(softcap) +
                            ", expected a positive finite number, or 0 for none");
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

Problem validate(const LatentAttentionForward& p, Memory memory) {
  const Checker check("latent_attention", memory);
  const Problem problem = validate_inputs(check, p);
  check.shape("y", p.y, {problem.batch, problem.heads, problem.tokens, problem.dim},
              "(batch, heads, tokens, channels)");
  check.dtype("y", p.y, {p.v.dtype, compute_dtype(problem.is_double)});
  check.writable("y", p.y);
  if (any_state(p.final)) check.state(kFinal, p.final, problem, Checker::Access::write);
  return problem;
}

Problem validate(const LatentAttentionBackward& p, Memory memory) {
  const Checker check("latent_attention_backward", memory);
  const Problem problem = validate_inputs(check, p);
  check.shape("dy", p.dy, {problem.batch, problem.heads, problem.tokens, problem.dim},
              "(batch, heads, tokens, channels)");
  const DType compute = compute_dtype(problem.is_double);
  check.dtype("dy", p.dy, {p.v.dtype, compute});
  if (present(p.d_log_sum)) {
    check.shape("d_log_sum", p.d_log_sum, {problem.batch, problem.heads, problem.tokens},
                "(batch, heads, tokens)");
    check.dtype("d_log_sum", p.d_log_sum, {compute});
  }
  check.gradient("dq", p.q, p.dq, compute);
  check.gradient("dk", p.k, p.dk, compute);
  check.gradient("dv", p.v, p.dv, compute);
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
  check.dtype("y", p.y, {p.v.dtype, compute_dtype(problem.is_double)});
  check.writable("y", p.y);
  check.state(kState, p.state, problem, Checker::Access::write);
  return problem;
}

namespace {

void validate_window(const Checker& check, int64_t window, int64_t past) {
  if (window < 1)
    check.fail(Kind::value, "window is " + std::to_string(window) + ", expected at least 1");
  if (past < 0)
    check.fail(Kind::value, "past is " + std::to_string(past) + ", expected at least 0");
}

void heads_fit(const Checker& check, const WindowProblem& p) {
  if (p.heads < 1 || p.kv_heads < 1 || p.key_dim < 1 || p.dim < 1)
    check.fail(Kind::value, "q, k, v have " + std::to_string(p.heads) + " heads, " +
                                std::to_string(p.kv_heads) + " key/value heads, " +
                                std::to_string(p.key_dim) + " key channels and " +
                                std::to_string(p.dim) + " channels, expected at least 1 of each");
  if (p.heads % p.kv_heads != 0)
    check.fail(Kind::value, "q has " + std::to_string(p.heads) +
                                " heads, expected a multiple of the " + std::to_string(p.kv_heads) +
                                " heads of k");
}

// Of a window or of its step, whose queries to the sinks are as those to the keys.
template <class Params>
void validate_sinks(const Checker& check, const Params& p, WindowProblem& problem) {
  if (!present(p.q_sink) && !present(p.k_sink) && !present(p.v_sink)) return;
  check.rank("sinks.k", p.k_sink, 4, "(sequences, key/value heads, sinks, key channels)");
  problem.sinks = p.k_sink.shape[2];
  if (problem.sinks < 1)
    check.fail(Kind::value,
               "sinks.k has " + std::to_string(problem.sinks) + " sinks, expected at least 1");
  const int64_t (&q)[4] = p.q.shape;
  if (p.q.rank == 4) {
    check.shape("sinks.q", p.q_sink, {q[0], q[1], q[2], q[3]}, "the shape of q");
  } else {
    check.shape("sinks.q", p.q_sink, {q[0], q[1], q[2]}, "the shape of q");
  }
  check.shape("sinks.k", p.k_sink,
              {problem.sequences, problem.kv_heads, problem.sinks, problem.key_dim},
              "(sequences, key/value heads, sinks, key channels)");
  check.shape("sinks.v", p.v_sink,
              {problem.sequences, problem.kv_heads, problem.sinks, problem.dim},
              "(sequences, key/value heads, sinks, channels)");
  check.floating("sinks.q", p.q_sink, problem.is_double);
  check.floating("sinks.k", p.k_sink, problem.is_double);
  check.floating("sinks.v", p.v_sink, problem.is_double);
  if (!present(p.sink_position)) return;
  check.shape("sinks.position", p.sink_position, {problem.sequences, problem.sinks},
              "(sequences, sinks)");
  check.dtype("sinks.position", p.sink_position, {DType::int64});
}

template <class Params>
WindowProblem validate_window_inputs(const Checker& check, const Params& p) {
  check.rank("q", p.q, 4, "(batch, heads, tokens, key channels)");
  check.rank("k", p.k, 4, "(batch, key/value heads, keys, key channels)");
  check.rank("v", p.v, 4, "(batch, key/value heads, keys, channels)");
  validate_window(check, p.window, p.past);
  WindowProblem problem;
  problem.batch = problem.sequences = p.q.shape[0];
  problem.heads = p.q.shape[1];
  problem.kv_heads = p.k.shape[1];
  problem.tokens = p.q.shape[2];
  problem.key_dim = p.q.shape[3];
  problem.dim = p.v.shape[3];
  heads_fit(check, problem);
  check.memory("q", p.q);
  if (present(p.cu_seqlens)) {
    problem.packed = true;
    problem.sequences = check.sequences(p.cu_seqlens, "q", problem.batch, problem.tokens);
  }
  problem.keys = problem.tokens + p.past * (problem.packed ? problem.sequences : 1);
  check.shape("k", p.k, {problem.batch, problem.kv_heads, problem.keys, problem.key_dim},
              "(batch, key/value heads, keys, key channels) of q");
  check.shape("v", p.v, {problem.batch, problem.kv_heads, problem.keys, problem.dim},
              "(batch, key/value heads, keys, channels) of q and k");
  problem.is_double = check.compute_type(p.q, p.k, p.v);
  check.finite_scale(p.scale);
  check.softcap(p.softcap);
  if (present(p.key_mask)) {
    check.dtype("key_mask", p.key_mask, {DType::boolean});
    check.shape("key_mask", p.key_mask, {problem.batch, problem.keys}, "(batch, keys)");
  }
  validate_sinks(check, p, problem);
  if (present(p.start)) check.positions("start", p.start, problem.sequences);
  return problem;
}

void validate_log_sum(const Checker& check, const char* name, const Tensor& t,
                      const WindowProblem& problem) {
  check.shape(name, t, {problem.batch, problem.heads, problem.tokens}, "(batch, heads, tokens)");
  check.dtype(name, t, {compute_dtype(problem.is_double)});
}

// An output row (B,H,T,D).
void validate_rows(const Checker& check, const char* name, const Tensor& t,
                   const WindowProblem& problem, std::initializer_list<DType> dtypes) {
  check.shape(name, t, {problem.batch, problem.heads, problem.tokens, problem.dim},
              "(batch, heads, tokens, channels)");
  check.dtype(name, t, dtypes);
}

WindowProblem validate_forward(const Checker& check, const SlidingWindowForward& p) {
  const WindowProblem problem = validate_window_inputs(check, p);
  validate_rows(check, "y", p.y, problem, {p.v.dtype});
  check.writable("y", p.y);
  if (present(p.log_sum)) {
    validate_log_sum(check, "log_sum", p.log_sum, problem);
    check.writable("log_sum", p.log_sum);
  }
  if (present(p.wide)) {
    validate_rows(check, "wide", p.wide, problem, {compute_dtype(problem.is_double)});
    check.writable("wide", p.wide);
  }
  return problem;
}

WindowProblem validate_backward(const Checker& check, const SlidingWindowBackward& p) {
  const WindowProblem problem = validate_window_inputs(check, p);
  const DType compute = compute_dtype(problem.is_double);
  validate_log_sum(check, "log_sum", p.log_sum, problem);
  validate_rows(check, "wide", p.wide, problem, {compute});
  validate_rows(check, "dy", p.dy, problem, {p.v.dtype, compute});
  if (present(p.d_log_sum)) validate_log_sum(check, "d_log_sum", p.d_log_sum, problem);
  check.gradient("dq", p.q, p.dq, compute);
  check.gradient("dk", p.k, p.dk, compute);
  check.gradient("dv", p.v, p.dv, compute);
  if (problem.sinks > 0) {
    check.gradient("dq_sink", p.q_sink, p.dq_sink, compute);
    check.gradient("dk_sink", p.k_sink, p.dk_sink, compute);
    check.gradient("dv_sink", p.v_sink, p.dv_sink, compute);
  }
  return problem;
}

WindowProblem validate_step(const Checker& check, const SlidingWindowStep& p) {
  check.rank("q", p.q, 3, "(sequences, heads, key channels)");
  check.rank("k", p.k, 3, "(sequences, key/value heads, key channels)");
  check.rank("v", p.v, 3, "(sequences, key/value heads, channels)");
  check.rank("cache.key", p.ring.key, 4, "(sequences, key/value heads, window, key channels)");
  WindowProblem problem;
  problem.batch = problem.sequences = p.q.shape[0];
  problem.heads = p.q.shape[1];
  problem.kv_heads = p.k.shape[1];
  problem.tokens = 1;
  problem.key_dim = p.q.shape[2];
  problem.dim = p.v.shape[2];
  const int64_t window = problem.keys = p.ring.key.shape[2];
  heads_fit(check, problem);
  validate_window(check, window, 0);
  check.memory("q", p.q);
  check.shape("k", p.k, {problem.batch, problem.kv_heads, problem.key_dim},
              "(sequences, key/value heads, key channels) of q");
  check.shape("v", p.v, {problem.batch, problem.kv_heads, problem.dim},
              "(sequences, key/value heads, channels) of q and k");
  problem.is_double = check.compute_type(p.q, p.k, p.v);
  check.finite_scale(p.scale);
  check.softcap(p.softcap);
  check.shape("y", p.y, {problem.batch, problem.heads, problem.dim},
              "(sequences, heads, channels)");
  check.dtype("y", p.y, {p.v.dtype});
  check.writable("y", p.y);
  const auto ring = [&](const char* name, const Tensor& t, int64_t channels) {
    check.shape(name, t, {problem.batch, problem.kv_heads, window, channels},
                "(sequences, key/value heads, window, channels)");
    check.floating(name, t, problem.is_double);
    check.writable(name, t);
  };
  ring("cache.key", p.ring.key, problem.key_dim);
  ring("cache.value", p.ring.value, problem.dim);
  check.apart("cache.key", p.ring.key, "cache.value", p.ring.value);
  check.shape("cache.valid", p.ring.valid, {problem.batch, window}, "(sequences, window)");
  check.dtype("cache.valid", p.ring.valid, {DType::boolean});
  check.writable("cache.valid", p.ring.valid);
  check.positions("cache.position", p.ring.position, problem.batch);
  check.writable("cache.position", p.ring.position);
  validate_sinks(check, p, problem);
  return problem;
}

// Both parts are cut at key/value heads of the window.
void latent_heads_fit(const Checker& check, const Tensor& k_latent, const WindowProblem& problem) {
  const int64_t heads = k_latent.shape[1];
  if (heads < 1 || heads % problem.kv_heads != 0 || problem.heads % heads != 0)
    check.fail(Kind::value, "k_latent has " + std::to_string(heads) +
                                " heads, expected a multiple of the " +
                                std::to_string(problem.kv_heads) + " heads of k that divides the " +
                                std::to_string(problem.heads) + " heads of q");
}

// q_latent, and what the latents have beside the window. All of it: the call of the latents sees
// parts, which are cut to size.
template <class Params>
Problem validate_latents(const Checker& check, const Params& p, WindowProblem& problem) {
  check.rank("q_latent", p.q_latent, 4, "(batch, heads, tokens, 1 + latents)");
  check.rank("k_latent", p.latent.k, 4, "(batch, latent heads, tokens, latents)");
  Problem latents;
  latents.sequences = problem.sequences;
  latents.kv_heads = p.latent.k.shape[1];
  latents.latents = problem.latents = p.latent.k.shape[3];
  latents.dim = problem.dim;
  latents.is_double = problem.is_double;
  check.shape("q_latent", p.q_latent,
              {problem.batch, problem.heads, problem.tokens, 1 + latents.latents},
              "(batch, heads, tokens, 1 + latents) of q and k_latent");
  check.dtype("q_latent", p.q_latent, {compute_dtype(problem.is_double)});
  check.finite_scale(p.latent.scale);
  latent_heads_fit(check, p.latent.k, problem);
  if (latents.latents == 0) return latents;
  check.shape("k_latent", p.latent.k,
              {problem.batch, latents.kv_heads, problem.tokens, latents.latents},
              "(batch, latent heads, tokens, latents) of q_latent");
  check.shape("v_latent", p.latent.v,
              {problem.batch, latents.kv_heads, problem.tokens, latents.dim},
              "(batch, latent heads, tokens, channels) of k_latent and v");
  if (present(p.latent.key_mask))
    check.shape("latent.key_mask", p.latent.key_mask, {problem.batch, problem.tokens},
                "(batch, tokens)");
  if (any_state(p.latent.initial))
    check.state(kState, p.latent.initial, latents, Checker::Access::read);
  return latents;
}

}  // namespace

WindowProblem validate(const SlidingWindowForward& p, Memory memory) {
  return validate_forward(Checker("sliding_window_attention", memory), p);
}

WindowProblem validate(const SlidingWindowBackward& p, Memory memory) {
  return validate_backward(Checker("sliding_window_attention_backward", memory), p);
}

WindowProblem validate(const SlidingWindowStep& p, Memory memory) {
  return validate_step(Checker("sliding_window_attention_step", memory), p);
}

WindowProblem validate(const MacchiatoForward& p, Memory memory) {
  const Checker check("macchiato_attention", memory);
  WindowProblem problem = validate_forward(check, p.window);
  const Problem latents = validate_latents(check, p, problem);
  validate_rows(check, "latent.y", p.latent.y, problem, {compute_dtype(problem.is_double)});
  check.writable("latent.y", p.latent.y);
  if (latents.latents > 0 && any_state(p.latent.final))
    check.state(kFinal, p.latent.final, latents, Checker::Access::write);
  return problem;
}

WindowProblem validate(const MacchiatoBackward& p, Memory memory) {
  const Checker check("macchiato_attention_backward", memory);
  WindowProblem problem = validate_backward(check, p.window);
  const Problem latents = validate_latents(check, p, problem);
  const DType compute = compute_dtype(problem.is_double);
  validate_rows(check, "y", p.y, problem, {compute});
  check.gradient("dq_latent", p.q_latent, p.dq_latent, compute);
  if (latents.latents > 0) {
    check.gradient("latent.dk", p.latent.k, p.latent.dk, compute);
    if (any_state(p.latent.d_final))
      check.state(kDFinal, p.latent.d_final, latents, Checker::Access::read);
    if (any_state(p.latent.d_initial))
      check.state(kDInitial, p.latent.d_initial, latents, Checker::Access::write);
  }
  if (p.one_value && problem.latents > 0) {
    const int64_t (&shape)[4] = p.window.v.shape;
    check.shape("latent.dv", p.latent.dv, {shape[0], shape[1], shape[2], shape[3]},
                "(batch, key/value heads, tokens, channels) of v");
    check.dtype("latent.dv", p.latent.dv, {compute});
  }
  return problem;
}

WindowProblem validate(const MacchiatoStep& p, Memory memory) {
  const Checker check("macchiato_attention_step", memory);
  WindowProblem problem = validate_step(check, p.window);
  check.rank("q_latent", p.q_latent, 3, "(sequences, heads, 1 + latents)");
  check.rank("k_latent", p.latent.k, 3, "(sequences, latent heads, latents)");
  problem.latents = p.latent.k.shape[2];
  check.shape("q_latent", p.q_latent, {problem.batch, problem.heads, 1 + problem.latents},
              "(sequences, heads, 1 + latents) of q and k_latent");
  latent_heads_fit(check, p.latent.k, problem);
  check.dtype("q_latent", p.q_latent, {compute_dtype(problem.is_double)});
  check.finite_scale(p.latent.scale);
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
