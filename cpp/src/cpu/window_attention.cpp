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
using cpu::Column;
using cpu::element_size;
using cpu::kAlignment;
using cpu::row_of;
using cpu::Rows;
using cpu::rows_of;
using cpu::WindowKernel;
using cpu::WindowStepTask;
using cpu::WindowTask;

int64_t round_up(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

Column column_of(const Tensor& t, int64_t batch, int64_t head, int64_t first) {
  if (!present(t)) return {};
  return {at(t, batch * t.stride[0] + head * t.stride[1] + first * t.stride[2]), t.stride[2],
          t.stride[1]};
}

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
Tensor behind_gate(const Tensor& t) {
  Tensor columns = t;
  const int64_t last = t.rank - 1;
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

LatentAttentionForward latents_of(const MacchiatoForward& p) {
  LatentAttentionForward latent = p.latent;
  latent.q = behind_gate(p.q_latent);
  latent.cu_seqlens = p.window.cu_seqlens;
  latent.causal = p.window.causal;
  return latent;
}

class MacchiatoForwardCall {
 public:
  MacchiatoForwardCall(const MacchiatoForward& p, int threads)
      : p_(p),
        problem_(validate(p)),
        threads_(threads),
        latent_(latents_of(p)),
        window_(p.window, problem_, threads) {}
  int64_t bytes() const {
    const int64_t latent = problem_.latents > 0 ? workspace_bytes(latent_, threads_) : 0;
    return latent > window_.bytes() ? latent : window_.bytes();
  }
  void run(char* memory) const {
    if (problem_.latents > 0) latent_attention_forward(latent_, memory, threads_);
    const bool same = p_.window.y.data == p_.latent.y.data;
    window_.run(memory, [&](WindowTask& task, const auto& r, int64_t head) {
      task.gate = rows_of(p_.q_latent, r.batch, head, r.first);
      task.gate_scale = p_.latent.scale;
      task.global = rows_of(p_.latent.y, r.batch, head, r.first);
      if (same) task.y = {};
    });
  }

 private:
  const MacchiatoForward& p_;
  const WindowProblem problem_;
  int threads_;
  LatentAttentionForward latent_;
  ForwardCall window_;
};

class MacchiatoBackwardCall {
 public:
  MacchiatoBackwardCall(const MacchiatoBackward& p, int threads)
      : p_(p),
        problem_(validate(p)),
        threads_(threads),
        window_(p.window, problem_, threads),
        gate_(p.window, problem_, WindowKernel::gate_gradient, problem_.heads, row_flops(problem_),
              threads),
        spread_(p.window, problem_, WindowKernel::gate_spread, problem_.heads, row_flops(problem_),
                threads) {}

  int64_t bytes() const {
    const int64_t latent =
        problem_.latents > 0 ? workspace_bytes(latents(nullptr), threads_) : int64_t{0};
    int64_t scratch = window_.bytes();
    for (const int64_t n : {latent, gate_.bytes(), spread_.bytes()})
      scratch = n > scratch ? n : scratch;
    return d_global_bytes() + 3 * column_bytes() + scratch;
  }

  void run(char* memory) const {
    const Tensor d_global = d_global_at(memory);
    memory += d_global_bytes();
    Tensor columns[3];
    for (Tensor& column : columns) {
      column = dense(memory, compute(), {problem_.batch, problem_.heads, problem_.tokens});
      memory += column_bytes();
    }
    const auto [share, delta, d_gate] = columns;
    const auto gate = [&](WindowTask& task, const auto& r, int64_t head) {
      task.gate = rows_of(p_.q_latent, r.batch, head, r.first);
      task.gate_scale = p_.latent.scale;
      task.share = column_of(share, r.batch, head, r.first);
      task.delta = column_of(delta, r.batch, head, r.first);
      task.d_gate = column_of(d_gate, r.batch, head, r.first);
    };
    gate_.run(memory, [&](WindowTask& task, const auto& r, int64_t head, int64_t) {
      gate(task, r, head);
      task.dy = rows_of(p_.window.dy, r.batch, head, r.first);
      task.global = rows_of(p_.y, r.batch, head, r.first);
      if (problem_.latents > 0) task.d_global = rows_of(d_global, r.batch, head, r.first);
    });
    if (problem_.latents > 0)
      latent_attention_backward(latents(static_cast<char*>(d_global.data)), memory, threads_);
    spread_.run(memory, [&](WindowTask& task, const auto& r, int64_t head, int64_t) {
      gate(task, r, head);
      task.dq_latent = rows_of(p_.dq_latent, r.batch, head, r.first);
    });
    window_.run(memory, gate);
  }

 private:
  DType compute() const { return problem_.is_double ? DType::float64 : DType::float32; }
  int64_t rows() const { return problem_.batch * problem_.heads * problem_.tokens; }
  int64_t column_bytes() const { return round_up(rows() * element_size(compute())); }
  int64_t d_global_bytes() const {
    return problem_.latents > 0 ? round_up(rows() * problem_.dim * element_size(compute())) : 0;
  }
  Tensor d_global_at(char* memory) const {
    return dense(memory, compute(),
                 {problem_.batch, problem_.heads, problem_.tokens, problem_.dim});
  }
  LatentAttentionBackward latents(char* d_global) const {
    static char placeholder;
    LatentAttentionBackward latent = p_.latent;
    latent.q = behind_gate(p_.q_latent);
    latent.cu_seqlens = p_.window.cu_seqlens;
    latent.causal = p_.window.causal;
    latent.dq = behind_gate(p_.dq_latent);
    latent.dy = d_global_at(d_global ? d_global : &placeholder);
    return latent;
  }

  const MacchiatoBackward& p_;
  const WindowProblem problem_;
  int threads_;
  BackwardCall window_;
  Stage<SlidingWindowBackward> gate_, spread_;
};

class StepCall {
 public:
  StepCall(const SlidingWindowStep& p, const WindowProblem& problem, int threads)
      : p_(p), problem_(problem), group_(problem.heads / problem.kv_heads) {
    const double flops = 2.0 * static_cast<double>(problem.keys) *
                         static_cast<double>((problem.key_dim + problem.dim) * problem.heads) *
                         static_cast<double>(problem.batch);
    threads_ = cpu::useful_threads(flops, cpu::kThreaded ? threads : 1);
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
    latent.q = behind_gate(p_.q_latent);
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
