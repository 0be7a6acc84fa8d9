// SPDX-License-Identifier: Apache-2.0
// Windows, alone and gated with latents. One call becomes tasks, one per sequence, head and segment
// of queries, spread over threads; where a sequence is cut changes no bit of the result.
#include "common/validate.h"
#include "cpu/heuristics.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/views.h"
#include "cpu/window_task.h"
#include "latte/latte.h"

namespace latte {
namespace {

using cpu::at;
using cpu::column_of;
using cpu::element_size;
using cpu::kAlignment;
using cpu::row_of;
using cpu::rows_of;
using cpu::WindowKernel;
using cpu::WindowStepTask;
using cpu::WindowTask;

int64_t round_up(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

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

// One stage of a call over all sequences, heads and segments. run()'s `fill` completes a task.
template <class Params>
class Stage {
 public:
  // `heads` that have tasks of their own: all, or those of keys and values.
  Stage(const Params& p, const WindowProblem& problem, WindowKernel kernel, int64_t heads,
        double flops_per_query, int threads)
      : p_(p), problem_(problem), kernel_(kernel), heads_(heads) {
    const int64_t all = problem.keys < 1 ? 1 : problem.keys;
    window_ = p.window < all ? p.window : all;
    const int64_t rows = problem.batch * problem.heads * problem.tokens;
    threads_ = cpu::useful_threads(flops_per_query * static_cast<double>(rows),
                                   cpu::kThreaded ? threads : 1);
    segment_ = cpu::window_segment(problem.batch * heads * problem.tokens, window_, threads_);
    for (int64_t n = 0; n < problem.sequences; ++n) {
      const int64_t tokens = range(n).tokens;
      longest_ = tokens > longest_ ? tokens : longest_;
    }
    WindowTask task = base_task();
    task.tokens = longest_;
    task.keys = longest_ + p.past;
    task.group = problem.heads / heads;
    scratch_ =
        round_up(cpu::kernels().window_workspace_bytes(kernel, problem.is_double, shaped(task)));
  }

  int64_t bytes() const { return threads_ * scratch_; }

  template <class Fill>
  void run(char* memory, Fill fill) const {
    const int64_t segments = longest_ < 1 ? 1 : (longest_ + segment_ - 1) / segment_;
    cpu::parallel_for(problem_.sequences * heads_ * segments, threads_, [&](int64_t i, int thread) {
      const int64_t sequence = i / (heads_ * segments);
      const int64_t head = i / segments % heads_, first = i % segments * segment_;
      const Range r = range(sequence);
      if (first >= r.tokens && first > 0) return;
      WindowTask task = base_task();
      const int64_t group = problem_.heads / heads_, q_head = head * group;
      const int64_t kv_head = q_head / (problem_.heads / problem_.kv_heads);
      task.tokens = r.tokens;
      task.keys = r.tokens + p_.past;
      task.group = group;
      task.begin = first;
      task.end = first + segment_ < r.tokens ? first + segment_ : r.tokens;
      task.q = rows_of(p_.q, r.batch, q_head, r.first);
      task.k = rows_of(p_.k, r.batch, kv_head, r.first_key);
      task.v = rows_of(p_.v, r.batch, kv_head, r.first_key);
      if (present(p_.key_mask)) {
        task.key_mask = static_cast<const bool*>(p_.key_mask.data) +
                        r.batch * p_.key_mask.stride[0] + r.first_key * p_.key_mask.stride[1];
        task.key_mask_stride = p_.key_mask.stride[1];
      }
      task.log_sum = column_of(p_.log_sum, r.batch, q_head, r.first);
      task.local = rows_of(p_.wide, r.batch, q_head, r.first);
      fill(task, r, q_head, kv_head);
      cpu::kernels().run_window(kernel_, problem_.is_double, task, memory + thread * scratch_);
    });
  }

  struct Range {
    int64_t batch, first, tokens, first_key;
  };

 private:
  Range range(int64_t sequence) const {
    if (!problem_.packed) return {sequence, 0, problem_.tokens, 0};
    const int64_t first = sequence_border(p_.cu_seqlens, sequence);
    return {0, first, sequence_border(p_.cu_seqlens, sequence + 1) - first,
            first + sequence * p_.past};
  }
  WindowTask base_task() const {
    WindowTask task;
    task.past = p_.past;
    task.key_dim = problem_.key_dim;
    task.dim = problem_.dim;
    task.window = window_;
    task.causal = p_.causal;
    task.scale = p_.scale;
    task.latents = problem_.latents;
    return task;
  }
  // With every feature that takes memory.
  WindowTask shaped(WindowTask task) const {
    static char placeholder;
    task.gate.data = &placeholder;
    return task;
  }

  const Params& p_;
  const WindowProblem& problem_;
  WindowKernel kernel_;
  int64_t heads_, window_ = 1, segment_ = 1, longest_ = 0, scratch_ = 0;
  int threads_ = 1;
};

template <class Params>
double band_flops(const Params& p, const WindowProblem& problem) {
  const int64_t seen = p.window < problem.keys ? p.window : problem.keys;
  return 2.0 * static_cast<double>(seen) * static_cast<double>(problem.key_dim + problem.dim) *
         (p.causal ? 1.0 : 2.0);
}

// Of a pass over the rows of y.
double row_flops(const WindowProblem& problem) {
  return 8.0 * static_cast<double>(problem.dim + problem.latents);
}

char* base_of(void* workspace, const char* op) {
  if (!workspace)
    throw Error(Error::Kind::value,
                "[" + std::string(op) + "] workspace is null, expected workspace_bytes() bytes");
  return cpu::aligned(workspace);
}

class ForwardCall {
 public:
  ForwardCall(const SlidingWindowForward& p, const WindowProblem& problem, int threads)
      : p_(p),
        stage_(p, problem, WindowKernel::forward, problem.heads, band_flops(p, problem), threads) {}
  int64_t bytes() const { return stage_.bytes(); }
  template <class Fill>
  void run(char* memory, Fill fill) const {
    stage_.run(memory, [&](WindowTask& task, const auto& r, int64_t head, int64_t) {
      task.y = rows_of(p_.y, r.batch, head, r.first);
      fill(task, r, head);
    });
  }

 private:
  const SlidingWindowForward& p_;
  Stage<SlidingWindowForward> stage_;
};

class BackwardCall {
 public:
  BackwardCall(const SlidingWindowBackward& p, const WindowProblem& problem, int threads)
      : p_(p),
        stage_(p, problem, WindowKernel::backward, problem.kv_heads, 2.5 * band_flops(p, problem),
               threads) {}
  int64_t bytes() const { return stage_.bytes(); }
  template <class Fill>
  void run(char* memory, Fill fill) const {
    stage_.run(memory, [&](WindowTask& task, const auto& r, int64_t head, int64_t kv_head) {
      task.dy = rows_of(p_.dy, r.batch, head, r.first);
      task.d_log_sum = column_of(p_.d_log_sum, r.batch, head, r.first);
      task.dq = rows_of(p_.dq, r.batch, head, r.first);
      task.dk = rows_of(p_.dk, r.batch, kv_head, r.first_key);
      task.dv = rows_of(p_.dv, r.batch, kv_head, r.first_key);
      fill(task, r, head);
    });
  }

 private:
  const SlidingWindowBackward& p_;
  Stage<SlidingWindowBackward> stage_;
};

// Some batch rows and key/value heads of a call with latents. The stages of a part follow each
// other while what passes between them is in cache.
class Part {
 public:
  // The first part of a call; `latent_heads` are those of the latents' keys.
  Part(const WindowProblem& problem, int64_t latent_heads, int threads)
      : problem_(problem), batches_(problem.batch), heads_(problem.kv_heads) {
    if (problem.batch < 1 || latent_heads % problem.kv_heads != 0) return;
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
    const int64_t window = ForwardCall(stages.window, stages.problem, threads_).bytes();
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
      ForwardCall(stages.window, stages.problem, threads_)
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
      for (Tensor* t : {&window.q, &window.k, &window.v, &window.y, &window.log_sum, &window.wide})
        *t = part.of(*t);
      window.key_mask = part.rows(window.key_mask);
    }
    WindowProblem problem;
    Tensor q_latent;
    LatentAttentionForward latent;
    SlidingWindowForward window;
  };

  Part part() const { return {problem_, p_.latent.k.shape[1], threads_}; }

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
    const int64_t window = BackwardCall(s.window, s.problem, threads_).bytes();
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
      BackwardCall(s.window, s.problem, threads_)
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
        bytes += round_up(count * element_size(compute));
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
                        &window.dq, &window.dk, &window.dv})
        *t = part.of(*t);
      window.key_mask = part.rows(window.key_mask);
    }
    WindowProblem problem;
    Tensor q_latent, y, dq_latent, share, delta;
    LatentAttentionBackward latent;
    SlidingWindowBackward window;
    int64_t bytes = 0;
  };

  Part part() const { return {problem_, p_.latent.k.shape[1], threads_}; }
  Stage<SlidingWindowBackward> gate_stage(const Stages& s) const {
    return {s.window, s.problem, WindowKernel::gate_gradient, s.problem.heads, row_flops(s.problem),
            threads_};
  }

  const MacchiatoBackward& p_;
  const WindowProblem problem_;
  int threads_;
};

class StepCall {
 public:
  StepCall(const SlidingWindowStep& p, const WindowProblem& problem, int threads)
      : p_(p), problem_(problem), group_(problem.heads / problem.kv_heads) {
    const double flops = 2.0 * static_cast<double>(problem.keys) *
                         static_cast<double>((problem.key_dim + problem.dim) * problem.heads) *
                         static_cast<double>(problem.batch);
    // A step is bound by reading the ring, at a quarter of the operations per second or less.
    threads_ = cpu::useful_threads(flops / 4, cpu::kThreaded ? threads : 1);
    WindowStepTask task = base_task();
    static char placeholder;
    task.gate.data = &placeholder;
    scratch_ = round_up(cpu::kernels().window_step_workspace_bytes(problem.is_double, task));
  }
  int64_t bytes() const { return threads_ * scratch_; }

  template <class Fill>
  void run(char* memory, Fill fill) const {
    auto* const position = static_cast<int64_t*>(p_.ring.position.data);
    auto* const valid = static_cast<bool*>(p_.ring.valid.data);
    const auto position_of = [&](int64_t n) -> int64_t& {
      return position[n * p_.ring.position.stride[0]];
    };
    for (int64_t n = 0; n < problem_.batch; ++n)
      valid[n * p_.ring.valid.stride[0] +
            position_of(n) % problem_.keys * p_.ring.valid.stride[1]] = true;
    cpu::parallel_for(problem_.batch * problem_.kv_heads, threads_, [&](int64_t i, int thread) {
      const int64_t n = i / problem_.kv_heads, kv_head = i % problem_.kv_heads;
      const int64_t head = kv_head * group_;
      WindowStepTask task = base_task();
      task.position = position_of(n);
      task.q = row_of(p_.q, n, head);
      task.k = row_of(p_.k, n, kv_head);
      task.v = row_of(p_.v, n, kv_head);
      task.y = row_of(p_.y, n, head);
      task.k_ring = rows_of(p_.ring.key, n, kv_head, 0);
      task.v_ring = rows_of(p_.ring.value, n, kv_head, 0);
      task.valid = valid + n * p_.ring.valid.stride[0];
      task.valid_stride = p_.ring.valid.stride[1];
      if (problem_.sinks > 0) {
        task.q_sink = row_of(p_.q_sink, n, head);
        task.k_sink = rows_of(p_.k_sink, n, kv_head, 0);
        task.v_sink = rows_of(p_.v_sink, n, kv_head, 0);
        if (present(p_.sink_position)) {
          task.sink_position =
              static_cast<const int64_t*>(p_.sink_position.data) + n * p_.sink_position.stride[0];
          task.sink_position_stride = p_.sink_position.stride[1];
        }
      }
      fill(task, n, head);
      cpu::kernels().run_window_step(problem_.is_double, task, memory + thread * scratch_);
    });
    for (int64_t n = 0; n < problem_.batch; ++n) ++position_of(n);
  }

 private:
  WindowStepTask base_task() const {
    WindowStepTask task;
    task.window = problem_.keys;
    task.key_dim = problem_.key_dim;
    task.dim = problem_.dim;
    task.group = group_;
    task.sinks = problem_.sinks;
    task.latents = problem_.latents;
    task.scale = p_.scale;
    return task;
  }

  const SlidingWindowStep& p_;
  const WindowProblem& problem_;
  int64_t group_, scratch_ = 0;
  int threads_ = 1;
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
    return round_up(problem_.batch * problem_.heads * problem_.dim * element_size(compute()));
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
  StepCall window_;
};

constexpr const char* kForward = "sliding_window_attention";
constexpr const char* kBackward = "sliding_window_attention_backward";
constexpr const char* kStep = "sliding_window_attention_step";
constexpr const char* kMacchiatoForward = "macchiato_attention";
constexpr const char* kMacchiatoBackward = "macchiato_attention_backward";
constexpr const char* kMacchiatoStep = "macchiato_attention_step";

constexpr auto kNothing = [](auto&&...) {};

}  // namespace

int64_t workspace_bytes(const SlidingWindowForward& params, int threads) {
  validate_threads(kForward, threads);
  const WindowProblem problem = validate(params);
  return ForwardCall(params, problem, threads).bytes() + kAlignment;
}
int64_t workspace_bytes(const SlidingWindowBackward& params, int threads) {
  validate_threads(kBackward, threads);
  const WindowProblem problem = validate(params);
  return BackwardCall(params, problem, threads).bytes() + kAlignment;
}
int64_t workspace_bytes(const SlidingWindowStep& params, int threads) {
  validate_threads(kStep, threads);
  const WindowProblem problem = validate(params);
  return StepCall(params, problem, threads).bytes() + kAlignment;
}
int64_t workspace_bytes(const MacchiatoForward& params, int threads) {
  validate_threads(kMacchiatoForward, threads);
  return MacchiatoForwardCall(params, threads).bytes() + kAlignment;
}
int64_t workspace_bytes(const MacchiatoBackward& params, int threads) {
  validate_threads(kMacchiatoBackward, threads);
  return MacchiatoBackwardCall(params, threads).bytes() + kAlignment;
}
int64_t workspace_bytes(const MacchiatoStep& params, int threads) {
  validate_threads(kMacchiatoStep, threads);
  return MacchiatoStepCall(params, threads).bytes() + kAlignment;
}

void sliding_window_forward(const SlidingWindowForward& params, void* workspace, int threads) {
  validate_threads(kForward, threads);
  const WindowProblem problem = validate(params);
  ForwardCall(params, problem, threads).run(base_of(workspace, kForward), kNothing);
}
void sliding_window_backward(const SlidingWindowBackward& params, void* workspace, int threads) {
  validate_threads(kBackward, threads);
  const WindowProblem problem = validate(params);
  BackwardCall(params, problem, threads).run(base_of(workspace, kBackward), kNothing);
}
void sliding_window_step(const SlidingWindowStep& params, void* workspace, int threads) {
  validate_threads(kStep, threads);
  const WindowProblem problem = validate(params);
  StepCall(params, problem, threads).run(base_of(workspace, kStep), kNothing);
}
void macchiato_forward(const MacchiatoForward& params, void* workspace, int threads) {
  validate_threads(kMacchiatoForward, threads);
  MacchiatoForwardCall(params, threads).run(base_of(workspace, kMacchiatoForward));
}
void macchiato_backward(const MacchiatoBackward& params, void* workspace, int threads) {
  validate_threads(kMacchiatoBackward, threads);
  MacchiatoBackwardCall(params, threads).run(base_of(workspace, kMacchiatoBackward));
}
void macchiato_step(const MacchiatoStep& params, void* workspace, int threads) {
  validate_threads(kMacchiatoStep, threads);
  MacchiatoStepCall(params, threads).run(base_of(workspace, kMacchiatoStep));
}

}  // namespace latte
