// SPDX-License-Identifier: Apache-2.0
// Latte Macchiato: a window and latents in one probability, out of the calls of both.
#include "cpu/window_call.h"

namespace latte {
namespace {

using cpu::at;
using cpu::column_of;
using cpu::kAlignment;
using cpu::round_to_alignment;
using cpu::row_of;
using cpu::rows_of;
using cpu::Stage;
using cpu::WindowBackwardCall;
using cpu::WindowForwardCall;
using cpu::WindowKernel;
using cpu::WindowStepCall;
using cpu::WindowStepTask;
using cpu::WindowTask;

// A dense tensor in the workspace.
Tensor dense(char* data, DType dtype, std::initializer_list<int64_t> shape) {
  Tensor t;
  t.data = data;
  t.dtype = dtype;
  for (const int64_t n : shape) t.shape[t.rank++] = n;
  for (int64_t i = t.rank - 1, stride = 1; i >= 0; stride *= t.shape[i--]) t.stride[i] = stride;
  return t;
}

// The columns 1.. of q_latent or of its gradient.
Tensor behind_gate(const Tensor& t, int last) {
  Tensor columns = t;
  columns.data = at(t, t.stride[last]);
  columns.shape[last] -= 1;
  return columns;
}

// Some batch rows and key/value heads of a call with latents. The stages of a part follow each
// other while what passes between them is in cache.
class Part {
 public:
  // The first part of a call.
  Part(const WindowProblem& problem, int threads)
      : problem_(problem), batches_(problem.batch), heads_(problem.kv_heads) {
    if (problem.batch < 1) return;
    int64_t enough = 1;
    while (enough < problem.kv_heads && (enough < threads || problem.kv_heads % enough != 0))
      ++enough;
    heads_ = enough;
    const int64_t rows = (threads + heads_ - 1) / heads_;
    batches_ = rows < problem.batch ? rows : problem.batch;
  }

  bool next() {
    head_ += heads_;
    if (head_ >= problem_.kv_heads) {
      head_ = 0;
      batch_ += batches_;
    }
    return batch_ < problem_.batch;
  }

  WindowProblem problem() const {
    WindowProblem part = problem_;
    part.batch = batches();
    part.heads = problem_.heads / problem_.kv_heads * heads_;
    part.kv_heads = heads_;
    if (!part.packed) part.sequences = part.batch;
    return part;
  }

  // Of a tensor (B, heads, ..), or (N, heads, ..): packed sequences are not parted.
  Tensor of(const Tensor& t) const {
    Tensor part = rows(t);
    if (!present(t)) return part;
    const int64_t group = t.shape[1] / problem_.kv_heads;
    part.shape[1] = heads_ * group;
    part.data = at(part, head_ * group * t.stride[1]);
    return part;
  }
  // Of a tensor (B, ..).
  Tensor rows(const Tensor& t) const {
    Tensor part = t;
    if (!present(t) || problem_.packed) return part;
    part.shape[0] = batches();
    part.data = at(t, batch_ * t.stride[0]);
    return part;
  }
  State of(const State& s) const { return {of(s.max), of(s.norm), of(s.mean)}; }

 private:
  int64_t batches() const {
    const int64_t left = problem_.batch - batch_;
    return batches_ < left ? batches_ : left;
  }

  const WindowProblem& problem_;
  int64_t batches_, heads_, batch_ = 0, head_ = 0;
};

class MacchiatoForwardCall {
 public:
  MacchiatoForwardCall(const MacchiatoForward& p, int threads)
      : p_(p), problem_(validate(p)), threads_(threads) {}

  int64_t bytes() const {
    const Stages stages(p_, part());
    const int64_t window = WindowForwardCall(stages.window, stages.problem, threads_).bytes();
    const int64_t latent =
        problem_.latents > 0 ? workspace_bytes(stages.latent, threads_) : int64_t{0};
    return latent > window ? latent : window;
  }

  void run(char* memory) const {
    const bool same = p_.window.y.data == p_.latent.y.data;
    Part part = this->part();
    do {
      const Stages stages(p_, part);
      if (problem_.latents > 0) latent_attention_forward(stages.latent, memory, threads_);
      WindowForwardCall(stages.window, stages.problem, threads_)
          .run(memory, [&](WindowTask& task, const auto& r, int64_t head) {
            task.gate = rows_of(stages.q_latent, r.batch, head, r.first);
            task.gate_scale = p_.latent.scale;
            task.global = rows_of(stages.latent.y, r.batch, head, r.first);
            if (same) task.y = {};
          });
    } while (part.next());
  }

 private:
  struct Stages {
    Stages(const MacchiatoForward& p, const Part& part)
        : problem(part.problem()),
          q_latent(part.of(p.q_latent)),
          latent(p.latent),
          window(p.window) {
      latent.q = behind_gate(q_latent, 3);
      latent.k = part.of(latent.k);
      latent.v = part.of(latent.v);
      latent.key_mask = part.rows(latent.key_mask);
      latent.cu_seqlens = window.cu_seqlens;
      latent.initial = part.of(latent.initial);
      latent.final = part.of(latent.final);
      latent.y = part.of(latent.y);
      latent.causal = window.causal;
      for (Tensor* t : {&window.q, &window.k, &window.v, &window.y, &window.log_sum, &window.wide,
                        &window.q_sink, &window.k_sink, &window.v_sink})
        *t = part.of(*t);
      for (Tensor* t : {&window.key_mask, &window.sink_position, &window.start}) *t = part.rows(*t);
    }
    WindowProblem problem;
    Tensor q_latent;
    LatentAttentionForward latent;
    SlidingWindowForward window;
  };

  Part part() const { return {problem_, threads_}; }

  const MacchiatoForward& p_;
  const WindowProblem problem_;
  int threads_;
};

class MacchiatoBackwardCall {
 public:
  MacchiatoBackwardCall(const MacchiatoBackward& p, int threads)
      : p_(p), problem_(validate(p)), threads_(threads) {}

  int64_t bytes() const {
    static char placeholder[kAlignment];
    const Stages s(p_, part(), placeholder);
    const int64_t window = WindowBackwardCall(s.window, s.problem, threads_).bytes();
    const int64_t gate = gate_stage(s).bytes(), scratch = gate > window ? gate : window;
    const int64_t latent = problem_.latents > 0 ? workspace_bytes(s.latent, threads_) : int64_t{0};
    return s.bytes + (latent > scratch ? latent : scratch);
  }

  void run(char* base) const {
    Part part = this->part();
    do {
      const Stages s(p_, part, base);
      char* const memory = base + s.bytes;
      const auto gate = [&](WindowTask& task, const auto& r, int64_t head) {
        task.share = column_of(s.share, r.batch, head, r.first);
        task.delta = column_of(s.delta, r.batch, head, r.first);
      };
      gate_stage(s).run(memory, [&](WindowTask& task, const auto& r, int64_t head, int64_t) {
        gate(task, r, head);
        task.gate = rows_of(s.q_latent, r.batch, head, r.first);
        task.gate_scale = p_.latent.scale;
        task.dy = rows_of(s.window.dy, r.batch, head, r.first);
        task.global = rows_of(s.y, r.batch, head, r.first);
        task.d_latents = column_of(s.latent.d_log_sum, r.batch, head, r.first);
        task.d_zeroth = rows_of(s.dq_latent, r.batch, head, r.first);
        if (problem_.latents > 0) task.d_global = rows_of(s.latent.dy, r.batch, head, r.first);
      });
      if (problem_.latents > 0) latent_attention_backward(s.latent, memory, threads_);
      WindowBackwardCall(s.window, s.problem, threads_)
          .run(memory, [&](WindowTask& task, const auto& r, int64_t head) {
            gate(task, r, head);
            if (p_.one_value && problem_.latents > 0)
              task.more_dv = rows_of(s.latent.dv, r.batch,
                                     head / (s.problem.heads / s.problem.kv_heads), r.first_key);
          });
    } while (part.next());
  }

 private:
  struct Stages {
    // d_global and the columns lie at `memory`.
    Stages(const MacchiatoBackward& p, const Part& part, char* memory)
        : problem(part.problem()),
          q_latent(part.of(p.q_latent)),
          y(part.of(p.y)),
          dq_latent(part.of(p.dq_latent)),
          latent(p.latent),
          window(p.window) {
      const DType compute = problem.is_double ? DType::float64 : DType::float32;
      const int64_t rows = problem.batch * problem.heads * problem.tokens;
      const auto take = [&](int64_t count) {
        char* const taken = memory + bytes;
        bytes += round_to_alignment(count * element_size(compute));
        return taken;
      };
      latent.dy = dense(take(problem.latents > 0 ? rows * problem.dim : 0), compute,
                        {problem.batch, problem.heads, problem.tokens, problem.dim});
      for (Tensor* column : {&share, &delta, &latent.d_log_sum})
        *column = dense(take(rows), compute, {problem.batch, problem.heads, problem.tokens});
      latent.q = behind_gate(q_latent, 3);
      latent.dq = behind_gate(dq_latent, 3);
      for (Tensor* t : {&latent.k, &latent.v, &latent.dk, &latent.dv}) *t = part.of(*t);
      for (State* s : {&latent.initial, &latent.d_final, &latent.d_initial}) *s = part.of(*s);
      latent.key_mask = part.rows(latent.key_mask);
      latent.cu_seqlens = window.cu_seqlens;
      latent.causal = window.causal;
      for (Tensor* t : {&window.q, &window.k, &window.v, &window.log_sum, &window.wide, &window.dy,
                        &window.dq, &window.dk, &window.dv, &window.q_sink, &window.k_sink,
                        &window.v_sink, &window.dq_sink, &window.dk_sink, &window.dv_sink})
        *t = part.of(*t);
      for (Tensor* t : {&window.key_mask, &window.sink_position, &window.start}) *t = part.rows(*t);
    }
    WindowProblem problem;
    Tensor q_latent, y, dq_latent, share, delta;
    LatentAttentionBackward latent;
    SlidingWindowBackward window;
    int64_t bytes = 0;
  };

  Part part() const { return {problem_, threads_}; }
  Stage<SlidingWindowBackward> gate_stage(const Stages& s) const {
    return {s.window,
            s.problem,
            WindowKernel::gate_gradient,
            s.problem.heads,
            cpu::row_flops(s.problem),
            threads_};
  }

  const MacchiatoBackward& p_;
  const WindowProblem problem_;
  int threads_;
};

class MacchiatoStepCall {
 public:
  MacchiatoStepCall(const MacchiatoStep& p, int threads)
      : p_(p), problem_(validate(p)), threads_(threads), window_(p.window, problem_, threads) {}
  int64_t bytes() const {
    const int64_t latent = problem_.latents > 0 ? workspace_bytes(latents(nullptr), threads_) : 0;
    return global_bytes() + (latent > window_.bytes() ? latent : window_.bytes());
  }
  void run(char* memory) const {
    const LatentAttentionStep latent = latents(memory);
    memory += global_bytes();
    if (problem_.latents > 0) latent_attention_step(latent, memory, threads_);
    window_.run(memory, [&](WindowStepTask& task, int64_t n, int64_t head) {
      task.gate = row_of(p_.q_latent, n, head);
      task.gate_scale = p_.latent.scale;
      task.global = row_of(latent.y, n, head);
    });
  }

 private:
  DType compute() const { return problem_.is_double ? DType::float64 : DType::float32; }
  int64_t global_bytes() const {
    return round_to_alignment(problem_.batch * problem_.heads * problem_.dim *
                              element_size(compute()));
  }
  LatentAttentionStep latents(char* y) const {
    static char placeholder;
    LatentAttentionStep latent = p_.latent;
    latent.q = behind_gate(p_.q_latent, 2);
    latent.y =
        dense(y ? y : &placeholder, compute(), {problem_.batch, problem_.heads, problem_.dim});
    return latent;
  }

  const MacchiatoStep& p_;
  const WindowProblem problem_;
  int threads_;
  WindowStepCall window_;
};

constexpr const char* kForward = "macchiato_attention";
constexpr const char* kBackward = "macchiato_attention_backward";
constexpr const char* kStep = "macchiato_attention_step";

template <class Call, class Params>
int64_t call_workspace(const Params& params, const char* op, int threads) {
  validate_threads(op, threads);
  return Call(params, threads).bytes() + kAlignment;
}
template <class Call, class Params>
void run_call(const Params& params, const char* op, void* workspace, int threads) {
  validate_threads(op, threads);
  Call(params, threads).run(cpu::workspace_base(workspace, op));
}

}  // namespace

int64_t workspace_bytes(const MacchiatoForward& params, int threads) {
  return call_workspace<MacchiatoForwardCall>(params, kForward, threads);
}
int64_t workspace_bytes(const MacchiatoBackward& params, int threads) {
  return call_workspace<MacchiatoBackwardCall>(params, kBackward, threads);
}
int64_t workspace_bytes(const MacchiatoStep& params, int threads) {
  return call_workspace<MacchiatoStepCall>(params, kStep, threads);
}

void macchiato_forward(const MacchiatoForward& params, void* workspace, int threads) {
  run_call<MacchiatoForwardCall>(params, kForward, workspace, threads);
}
void macchiato_backward(const MacchiatoBackward& params, void* workspace, int threads) {
  run_call<MacchiatoBackwardCall>(params, kBackward, workspace, threads);
}
void macchiato_step(const MacchiatoStep& params, void* workspace, int threads) {
  run_call<MacchiatoStepCall>(params, kStep, workspace, threads);
}

}  // namespace latte
