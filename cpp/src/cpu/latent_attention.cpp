// SPDX-License-Identifier: Apache-2.0
// One call becomes tasks, one per sequence and head, spread over threads. A task's result depends
// on nothing but its own inputs, so batch and thread count cannot change a bit; only a sequence so
// long that other threads would wait for it is cut (sequence_parallel.h), with rounding of its own.
#include "common/validate.h"
#include "cpu/heuristics.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/sequence_parallel.h"
#include "cpu/views.h"
#include "latte/latte.h"

namespace latte {
namespace {

using cpu::at;
using cpu::column_of;
using cpu::HeadState;
using cpu::HeadTask;
using cpu::kAlignment;
using cpu::Kernel;
using cpu::row_of;
using cpu::rows_of;

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
  task.tokens = task.end = range.tokens;
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

// Do the heads of a token lie side by side, as in (B,T,H,.)?
bool heads_inside(const Tensor& rows) { return rows.stride[1] < rows.stride[2]; }

// The tasks of a call: how many, which kernel, whether heads are walked together, and task i.
class ForwardCall {
 public:
  explicit ForwardCall(const LatentAttentionForward& p) : problem(validate(p)), p_(p) {
    // A causal task per query head keeps every thread busy; its siblings repeat the key side and
    // the first of them writes the state. Bidirectional tasks share the summary of the keys.
    group_ = p.causal ? 1 : problem.heads / problem.kv_heads;
  }
  bool causal() const { return p_.causal; }
  Kernel kernel() const {
    return p_.causal ? Kernel::causal_forward : Kernel::bidirectional_forward;
  }
  bool together() const { return p_.causal && heads_inside(p_.v); }
  int64_t tasks_per_sequence() const { return problem.heads / group_; }
  int64_t tokens(int64_t sequence) const { return range_of(p_, problem, sequence).tokens; }
  double flops_per_token() const { return 4.0; }
  HeadTask task(int64_t i) const {
    const int64_t sequence = i / tasks_per_sequence(), head = i % tasks_per_sequence() * group_;
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
  bool causal() const { return p_.causal; }
  Kernel kernel() const {
    return p_.causal ? Kernel::causal_backward : Kernel::bidirectional_backward;
  }
  // Half precision keeps rows of its own between the passes: of two heads they cost more memory
  // traffic (1.05 times the time) than the pages save.
  bool together() const {
    return p_.causal && heads_inside(p_.v) && p_.dk.dtype != DType::bfloat16 &&
           p_.dk.dtype != DType::float16;
  }
  int64_t tasks_per_sequence() const { return problem.kv_heads; }
  int64_t tokens(int64_t sequence) const { return range_of(p_, problem, sequence).tokens; }
  double flops_per_token() const { return 12.0 * static_cast<double>(group_); }
  HeadTask task(int64_t i) const {
    const int64_t sequence = i / problem.kv_heads, kv_head = i % problem.kv_heads;
    const int64_t head = kv_head * group_;
    HeadTask t = sequence_task(p_, problem, sequence, head, group_);
    const Range range = range_of(p_, problem, sequence);
    t.dy = rows_of(p_.dy, range.batch, head, range.first);
    t.d_log_sum = column_of(p_.d_log_sum, range.batch, head, range.first);
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
  bool together() const { return false; }
  int64_t tasks_per_sequence() const { return problem.kv_heads; }
  int64_t tokens(int64_t) const { return 1; }
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

// How a call spreads over threads and where its memory lies in the workspace:
//   per thread: scratch, and for a backward task what its two passes share;
//   cut sequences: their list, then per task the shared part and the slots.
template <class Call, class Stages>
class Plan {
 public:
  Plan(const Call& call, int threads) : call_(call) {
    const Problem& p = call.problem;
    for (int64_t n = 0; n < p.sequences; ++n) total_ += call.tokens(n);
    const double flops = call.flops_per_token() * static_cast<double>(total_) *
                         static_cast<double>(p.heads) * static_cast<double>(p.latents) *
                         static_cast<double>(p.dim);
    total_ *= call.tasks_per_sequence();
    threads_ = cpu::useful_threads(flops, cpu::kThreaded ? threads : 1);
    element_size_ = p.is_double ? 8 : 4;
    if (call.together())
      together_ = cpu::heads_together(p.sequences, call.tasks_per_sequence(), threads_);
    const auto& kernels = cpu::kernels();
    const int64_t slot = cpu::Slots::bytes(p.latents, p.dim, element_size_);
    int64_t per_cut_task = 0;
    for (int64_t n = 0; n < p.sequences && tasks() > 0; ++n) {
      HeadTask task = call.task(n * call.tasks_per_sequence());
      task.together = together_;
      const int64_t parts = parts_of(n);
      const int64_t shared = kernels.shared_bytes(call.kernel(), p.is_double, task);
      if (n == 0) {
        scratch_ = kernels.workspace_bytes(call.kernel(), p.is_double, task);
        const int64_t summary =
            Stages::kPhases > 1 ? kernels.workspace_bytes(Kernel::key_summary, p.is_double, task)
                                : 0;
        scratch_ = scratch_ > summary ? scratch_ : summary;
      }
      if (parts > 1) {
        ++cuts_;
        const int64_t bytes = shared + Stages::slots(parts) * slot;
        per_cut_task = per_cut_task > bytes ? per_cut_task : bytes;
      } else {
        shared_ = shared_ > shared ? shared_ : shared;
      }
    }
    cut_bytes_ = per_cut_task;
    if (cuts_ == 0 && groups() < threads_) threads_ = groups() < 1 ? 1 : static_cast<int>(groups());
  }

  int64_t bytes() const {
    return threads_ * thread_bytes() + list_bytes() +
           cuts_ * call_.tasks_per_sequence() * cut_bytes_;
  }

  void run(char* base) const {
    auto* const cut_sequences = reinterpret_cast<int64_t*>(base + threads_ * thread_bytes());
    int64_t found = 0;
    for (int64_t n = 0; n < call_.problem.sequences && found < cuts_; ++n)
      if (parts_of(n) > 1) cut_sequences[found++] = n;
    for (int phase = 0; phase < Stages::kPhases && (phase == 0 || cuts_ > 0); ++phase) {
      int64_t stages = 0;
      for (int64_t c = 0; c < cuts_; ++c) stages += stages_of(cut_sequences[c], phase);
      // The cut sequences are the long ones: they start first.
      const int64_t whole = phase == 0 ? groups() : 0;
      cpu::parallel_for(
          stages + whole, threads_,
          [&](int64_t i, int thread) {
            char* const scratch = base + thread * thread_bytes();
            i < stages ? run_stage(cut_sequences, phase, i, base, scratch)
                       : run_whole(i - stages, scratch);
          },
          call_.kernel() == Kernel::step ? cpu::step_grain(groups(), threads_) : 1);
    }
  }

 private:
  int64_t tasks() const { return call_.problem.sequences * call_.tasks_per_sequence(); }
  int64_t groups_per_sequence() const {
    return (call_.tasks_per_sequence() + together_ - 1) / together_;
  }
  int64_t groups() const { return call_.problem.sequences * groups_per_sequence(); }
  int64_t parts_of(int64_t sequence) const {
    return Stages::kPhases > 1 ? cpu::parts(call_.tokens(sequence), total_, threads_) : 1;
  }
  int64_t stages_of(int64_t sequence, int phase) const {
    return call_.tasks_per_sequence() * Stages::stages(phase, parts_of(sequence));
  }
  int64_t slot_bytes() const {
    return cpu::Slots::bytes(call_.problem.latents, call_.problem.dim, element_size_);
  }
  int64_t thread_bytes() const { return scratch_ + together_ * task_bytes(); }
  // What a task needs beside the scratch: the shared part, and a final state.
  int64_t task_bytes() const {
    return shared_ + (call_.kernel() == Kernel::causal_backward ? slot_bytes() : 0);
  }
  int64_t list_bytes() const { return (cuts_ * 8 + 63) / 64 * 64; }
  cpu::Slots slots(char* base) const {
    return {base, call_.problem.latents, call_.problem.dim, element_size_};
  }
  cpu::StageRunner runner(char* scratch) const {
    return {cpu::kernels(), call_.problem.is_double, scratch};
  }

  void run_whole(int64_t i, char* scratch) const {
    const int64_t sequence = i / groups_per_sequence();
    if (parts_of(sequence) > 1) return;
    const int64_t heads = call_.tasks_per_sequence(), head = i % groups_per_sequence() * together_;
    const int64_t count = heads - head < together_ ? heads - head : together_;
    // An array of tasks costs 70 ns to clear, as much as a head of a step.
    if (count == 1) {
      const HeadTask task = whole_task(sequence * heads + head, scratch + scratch_);
      return runner(scratch)(call_.kernel(), task);
    }
    HeadTask group[cpu::kHeadsTogether];
    for (int64_t h = 0; h < count; ++h)
      group[h] = whole_task(sequence * heads + head + h, scratch + scratch_ + h * task_bytes());
    group->together = count;
    runner(scratch)(call_.kernel(), *group);
  }

  HeadTask whole_task(int64_t i, char* memory) const {
    HeadTask task = call_.task(i);
    task.shared = memory;
    // Pass R starts from the final state that pass F leaves.
    if (call_.kernel() == Kernel::causal_backward) task.final = slots(memory + shared_)[0];
    return task;
  }

  void run_stage(const int64_t* cut_sequences, int phase, int64_t i, char* base,
                 char* scratch) const {
    int64_t c = 0;
    for (; i >= stages_of(cut_sequences[c], phase); ++c) i -= stages_of(cut_sequences[c], phase);
    const int64_t parts = parts_of(cut_sequences[c]), per_task = Stages::stages(phase, parts);
    const int64_t head = i / per_task;
    char* const memory = base + threads_ * thread_bytes() + list_bytes() +
                         (c * call_.tasks_per_sequence() + head) * cut_bytes_;
    cpu::CutTask cut{call_.task(cut_sequences[c] * call_.tasks_per_sequence() + head), parts,
                     slots(memory)};
    cut.task.shared = memory + Stages::slots(parts) * slot_bytes();
    Stages::run_stage(cut, phase, i % per_task, runner(scratch));
  }

  const Call& call_;
  int64_t total_ = 0, element_size_ = 4, scratch_ = 0, shared_ = 0, cuts_ = 0, cut_bytes_ = 0;
  int64_t together_ = 1;
  int threads_ = 1;
};

// Calls f with the call's plan.
template <class Call, class Causal, class Bidirectional, class F>
auto with_plan(const Call& call, int threads, F f) {
  return call.causal() ? f(Plan<Call, Causal>(call, threads))
                       : f(Plan<Call, Bidirectional>(call, threads));
}
template <class F>
auto with_plan(const ForwardCall& call, int threads, F f) {
  return with_plan<ForwardCall, cpu::CausalForwardStages, cpu::BidirectionalForwardStages>(
      call, threads, f);
}
template <class F>
auto with_plan(const BackwardCall& call, int threads, F f) {
  return with_plan<BackwardCall, cpu::CausalBackwardStages, cpu::BidirectionalBackwardStages>(
      call, threads, f);
}
template <class F>
auto with_plan(const StepCall& call, int threads, F f) {
  return f(Plan<StepCall, cpu::NoStages>(call, threads));
}

template <class Params, class Call>
int64_t call_workspace(const Params& params, const char* op, int threads) {
  const Call call(params);
  validate_threads(op, threads);
  return with_plan(call, threads, [](const auto& plan) { return plan.bytes() + kAlignment; });
}

template <class Params, class Call>
void run_call(const Params& params, const char* op, void* workspace, int threads) {
  const Call call(params);
  validate_threads(op, threads);
  char* const base = cpu::workspace_base(workspace, op);
  with_plan(call, threads, [&](const auto& plan) { plan.run(base); });
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

// Serial: it moves 3 L D numbers per head, which a second thread does not hasten.
void state_merge(const StateMerge& params) {
  const Problem problem = validate(params);
  HeadTask task;
  task.latents = problem.latents;
  task.dim = problem.dim;
  for (int64_t n = 0; n < problem.sequences; ++n)
    for (int64_t h = 0; h < problem.kv_heads; ++h) {
      task.initial = state_of(params.a, n, h);
      task.other = state_of(params.b, n, h);
      task.final = state_of(params.out, n, h);
      cpu::kernels().run(Kernel::merge_states, problem.is_double, task, nullptr);
    }
}

}  // namespace latte
