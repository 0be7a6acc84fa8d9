// SPDX-License-Identifier: Apache-2.0
// One call becomes independent tasks, one per sequence and head, spread over threads. A task's
// result depends on nothing but its own inputs, so batch and thread count cannot change a bit.
#include "common/validate.h"
#include "cpu/heuristics.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "latte/latte.h"

namespace latte {
namespace {

using cpu::HeadState;
using cpu::HeadTask;
using cpu::Kernel;
using cpu::Rows;

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64:
      return 8;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::boolean:
      return 1;
    default:
      return 2;
  }
}

void* at(const Tensor& t, int64_t offset) {
  return static_cast<char*>(t.data) + offset * element_size(t.dtype);
}

// Rows (t, c) of a (B, heads, T, C) tensor from head `head` and token `first` on.
Rows rows_of(const Tensor& t, int64_t batch, int64_t head, int64_t first) {
  if (!present(t)) return {};
  return {at(t, batch * t.stride[0] + head * t.stride[1] + first * t.stride[2]), t.dtype,
          t.stride[2], t.stride[1], t.stride[3]};
}

// The same of an (N, heads, C) tensor: one token.
Rows row_of(const Tensor& t, int64_t sequence, int64_t head) {
  return {at(t, sequence * t.stride[0] + head * t.stride[1]), t.dtype, 0, t.stride[1], t.stride[2]};
}

HeadState state_of(const State& s, int64_t sequence, int64_t head) {
  HeadState h;
  if (!present(s.mean)) return h;
  if (present(s.max)) {
    h.max = at(s.max, sequence * s.max.stride[0] + head * s.max.stride[1]);
    h.max_stride = s.max.stride[2];
  }
  h.norm = at(s.norm, sequence * s.norm.stride[0] + head * s.norm.stride[1]);
  h.norm_stride = s.norm.stride[2];
  h.mean = at(s.mean, sequence * s.mean.stride[0] + head * s.mean.stride[1]);
  h.mean_stride_l = s.mean.stride[2];
  h.mean_stride_d = s.mean.stride[3];
  return h;
}

struct Range {
  int64_t batch, first, tokens;
};

template <class Params>
Range range_of(const Params& p, const Problem& problem, int64_t sequence) {
  if (!problem.packed) return {sequence, 0, problem.tokens};
  const int64_t first = sequence_border(p.cu_seqlens, sequence);
  return {0, first, sequence_border(p.cu_seqlens, sequence + 1) - first};
}

template <class Params>
HeadTask sequence_task(const Params& p, const Problem& problem, int64_t sequence, int64_t head,
                       int64_t group) {
  const Range range = range_of(p, problem, sequence);
  const int64_t kv_head = head / (problem.heads / problem.kv_heads);
  HeadTask task;
  task.tokens = range.tokens;
  task.latents = problem.latents;
  task.dim = problem.dim;
  task.group = group;
  task.scale = p.scale;
  task.q = rows_of(p.q, range.batch, head, range.first);
  task.k = rows_of(p.k, range.batch, kv_head, range.first);
  task.v = rows_of(p.v, range.batch, kv_head, range.first);
  if (present(p.key_mask)) {
    task.key_mask = static_cast<const bool*>(p.key_mask.data) + range.batch * p.key_mask.stride[0] +
                    range.first * p.key_mask.stride[1];
    task.key_mask_stride = p.key_mask.stride[1];
  }
  task.initial = state_of(p.initial, sequence, kv_head);
  return task;
}

// The tasks of a call: how many, which kernel, and task i.
class ForwardCall {
 public:
  explicit ForwardCall(const LatentAttentionForward& p) : problem(validate(p)), p_(p) {
    // A causal task per query head keeps every thread busy; its siblings repeat the key side and
    // the first of them writes the state. Bidirectional tasks share the summary of the keys.
    group_ = p.causal ? 1 : problem.heads / problem.kv_heads;
  }
  Kernel kernel() const {
    return p_.causal ? Kernel::causal_forward : Kernel::bidirectional_forward;
  }
  int64_t tasks() const { return problem.sequences * problem.heads / group_; }
  double flops_per_token() const { return 4.0; }
  HeadTask task(int64_t i) const {
    const int64_t per_sequence = problem.heads / group_;
    const int64_t sequence = i / per_sequence, head = i % per_sequence * group_;
    HeadTask t = sequence_task(p_, problem, sequence, head, group_);
    const Range range = range_of(p_, problem, sequence);
    t.y = rows_of(p_.y, range.batch, head, range.first);
    const int64_t heads_per_state = problem.heads / problem.kv_heads;
    if (head % heads_per_state == 0) t.final = state_of(p_.final, sequence, head / heads_per_state);
    return t;
  }
  const Problem problem;

 private:
  const LatentAttentionForward& p_;
  int64_t group_;
};

class BackwardCall {
 public:
  explicit BackwardCall(const LatentAttentionBackward& p)
      : problem(validate(p)), p_(p), group_(problem.heads / problem.kv_heads) {}
  Kernel kernel() const {
    return p_.causal ? Kernel::causal_backward : Kernel::bidirectional_backward;
  }
  int64_t tasks() const { return problem.sequences * problem.kv_heads; }
  double flops_per_token() const { return 12.0 * static_cast<double>(group_); }
  HeadTask task(int64_t i) const {
    const int64_t sequence = i / problem.kv_heads, kv_head = i % problem.kv_heads;
    const int64_t head = kv_head * group_;
    HeadTask t = sequence_task(p_, problem, sequence, head, group_);
    const Range range = range_of(p_, problem, sequence);
    t.dy = rows_of(p_.dy, range.batch, head, range.first);
    t.dq = rows_of(p_.dq, range.batch, head, range.first);
    t.dk = rows_of(p_.dk, range.batch, kv_head, range.first);
    t.dv = rows_of(p_.dv, range.batch, kv_head, range.first);
    t.d_final = state_of(p_.d_final, sequence, kv_head);
    t.d_initial = state_of(p_.d_initial, sequence, kv_head);
    return t;
  }
  const Problem problem;

 private:
  const LatentAttentionBackward& p_;
  int64_t group_;
};

class StepCall {
 public:
  explicit StepCall(const LatentAttentionStep& p)
      : problem(validate(p)), p_(p), group_(problem.heads / problem.kv_heads) {}
  Kernel kernel() const { return Kernel::step; }
  int64_t tasks() const { return problem.sequences * problem.kv_heads; }
  double flops_per_token() const { return 4.0 * static_cast<double>(group_); }
  HeadTask task(int64_t i) const {
    const int64_t sequence = i / problem.kv_heads, kv_head = i % problem.kv_heads;
    HeadTask t;
    t.tokens = 1;
    t.latents = problem.latents;
    t.dim = problem.dim;
    t.group = group_;
    t.scale = p_.scale;
    t.q = row_of(p_.q, sequence, kv_head * group_);
    t.k = row_of(p_.k, sequence, kv_head);
    t.v = row_of(p_.v, sequence, kv_head);
    t.y = row_of(p_.y, sequence, kv_head * group_);
    t.initial = state_of(p_.state, sequence, kv_head);
    return t;
  }
  const Problem problem;

 private:
  const LatentAttentionStep& p_;
  int64_t group_;
};

template <class Call>
int threads_for(const Call& call, int threads) {
  const Problem& p = call.problem;
  const double tokens = static_cast<double>(p.packed ? p.tokens : p.tokens * p.batch);
  const double flops = call.flops_per_token() * tokens * static_cast<double>(p.heads) *
                       static_cast<double>(p.latents) * static_cast<double>(p.dim);
  return cpu::useful_threads(call.tasks(), flops, threads);
}

// The scratch of one thread: that of the largest task (only the number of tokens differs).
template <class Call>
int64_t scratch_bytes(const Call& call) {
  const Problem& p = call.problem;
  if (call.tasks() == 0) return 0;
  HeadTask largest = call.task(0);
  if (p.packed) {
    const int64_t per_sequence = call.tasks() / p.sequences;
    for (int64_t n = 1; n < p.sequences; ++n) {
      const HeadTask t = call.task(n * per_sequence);
      if (t.tokens > largest.tokens) largest = t;
    }
  }
  return cpu::kernels().workspace_bytes(call.kernel(), p.is_double, largest);
}

constexpr int64_t kAlignment = 64;

template <class Params, class Call>
int64_t call_workspace(const Params& params, const char* op, int threads) {
  const Call call(params);
  validate_threads(op, threads);
  return scratch_bytes(call) * threads_for(call, threads) + kAlignment;
}

template <class Params, class Call>
void run_call(const Params& params, const char* op, void* workspace, int threads) {
  const Call call(params);
  validate_threads(op, threads);
  if (!workspace)
    throw Error(Error::Kind::value,
                "[" + std::string(op) + "] workspace is null, expected workspace_bytes() bytes");
  const auto address = reinterpret_cast<uintptr_t>(workspace);
  char* const base =
      static_cast<char*>(workspace) + (kAlignment - address % kAlignment) % kAlignment;
  const int64_t bytes = scratch_bytes(call);
  const auto& kernels = cpu::kernels();
  cpu::parallel_for(call.tasks(), threads_for(call, threads), [&](int64_t i, int thread) {
    kernels.run(call.kernel(), call.problem.is_double, call.task(i), base + thread * bytes);
  });
}

}  // namespace

int64_t workspace_bytes(const LatentAttentionForward& params, int threads) {
  return call_workspace<LatentAttentionForward, ForwardCall>(params, "latent_attention", threads);
}
int64_t workspace_bytes(const LatentAttentionBackward& params, int threads) {
  return call_workspace<LatentAttentionBackward, BackwardCall>(params, "latent_attention_backward",
                                                               threads);
}
int64_t workspace_bytes(const LatentAttentionStep& params, int threads) {
  return call_workspace<LatentAttentionStep, StepCall>(params, "latent_attention_step", threads);
}

void latent_attention_forward(const LatentAttentionForward& params, void* workspace, int threads) {
  run_call<LatentAttentionForward, ForwardCall>(params, "latent_attention", workspace, threads);
}
void latent_attention_backward(const LatentAttentionBackward& params, void* workspace,
                               int threads) {
  run_call<LatentAttentionBackward, BackwardCall>(params, "latent_attention_backward", workspace,
                                                  threads);
}
void latent_attention_step(const LatentAttentionStep& params, void* workspace, int threads) {
  run_call<LatentAttentionStep, StepCall>(params, "latent_attention_step", workspace, threads);
}

}  // namespace latte
