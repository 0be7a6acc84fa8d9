// SPDX-License-Identifier: Apache-2.0
// A call over windows, alone or gated with latents, becomes tasks: one per sequence, head and
// segment of queries, spread over threads. Where a sequence is cut changes no bit of the result.
#pragma once

#include "common/validate.h"
#include "cpu/heuristics.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/views.h"
#include "cpu/window_task.h"
#include "latte/latte.h"

namespace latte::cpu {

// The keys and values of sinks, of a task of a window or of its step.
template <class Params, class Task>
void set_sinks(const Params& p, int64_t sequence, int64_t kv_head, Task& task) {
  task.k_sink = rows_of(p.k_sink, sequence, kv_head, 0);
  task.v_sink = rows_of(p.v_sink, sequence, kv_head, 0);
  if (!present(p.sink_position)) return;
  task.sink_position =
      static_cast<const int64_t*>(p.sink_position.data) + sequence * p.sink_position.stride[0];
  task.sink_position_stride = p.sink_position.stride[1];
}

// One stage of a call over all sequences, heads and segments. run()'s `fill` completes a task.
template <class Params>
class Stage {
 public:
  // `heads` that have tasks of their own: all, or those of keys and values. Sequences are cut at
  // multiples of `cut`.
  Stage(const Params& p, const WindowProblem& problem, WindowKernel kernel, int64_t heads,
        double flops_per_query, int threads, int64_t cut = 1)
      : p_(p), problem_(problem), kernel_(kernel), heads_(heads) {
    const int64_t all = problem.keys < 1 ? 1 : problem.keys;
    window_ = p.window < all ? p.window : all;
    const int64_t rows = problem.batch * problem.heads * problem.tokens;
    threads_ = useful_threads(flops_per_query * static_cast<double>(rows), kThreaded ? threads : 1);
    segment_ = window_segment(problem.batch * heads * problem.tokens, window_, threads_);
    segment_ = (segment_ + cut - 1) / cut * cut;
    for (int64_t n = 0; n < problem.sequences; ++n) {
      const int64_t tokens = range(n).tokens;
      longest_ = tokens > longest_ ? tokens : longest_;
    }
    WindowTask task = base_task();
    task.tokens = longest_;
    task.keys = longest_ + p.past;
    task.group = problem.heads / heads;
    scratch_ = round_to_alignment(
        kernels().window_workspace_bytes(kernel, problem.is_double, shaped(task)));
  }

  int64_t bytes() const { return threads_ * scratch_; }
  int64_t bytes_per_thread() const { return scratch_; }

  template <class Fill>
  void run(char* memory, Fill fill) const {
    const int64_t segments = longest_ < 1 ? 1 : (longest_ + segment_ - 1) / segment_;
    parallel_for(problem_.sequences * heads_ * segments, threads_, [&](int64_t i, int thread) {
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
      if (problem_.sinks > 0) {
        task.q_sink = rows_of(p_.q_sink, r.batch, q_head, r.first);
        set_sinks(p_, sequence, kv_head, task);
        if (present(p_.start))
          task.start = static_cast<const int64_t*>(p_.start.data)[sequence * p_.start.stride[0]];
      }
      fill(task, r, q_head, kv_head);
      kernels().run_window(kernel_, problem_.is_double, task, memory + thread * scratch_);
    });
  }

  struct Range {
    int64_t sequence, batch, first, tokens, first_key;
  };

 private:
  Range range(int64_t sequence) const {
    if (!problem_.packed) return {sequence, sequence, 0, problem_.tokens, 0};
    const int64_t first = sequence_border(p_.cu_seqlens, sequence);
    return {sequence, 0, first, sequence_border(p_.cu_seqlens, sequence + 1) - first,
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
    task.softcap = p_.softcap;
    task.latents = problem_.latents;
    task.sinks = problem_.sinks;
    task.reach = p_.window;
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
inline double row_flops(const WindowProblem& problem) {
  return 8.0 * static_cast<double>(problem.dim + problem.latents);
}

class WindowForwardCall {
 public:
  WindowForwardCall(const SlidingWindowForward& p, const WindowProblem& problem, int threads)
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

class WindowBackwardCall {
 public:
  WindowBackwardCall(const SlidingWindowBackward& p, const WindowProblem& problem, int threads)
      : p_(p),
        problem_(problem),
        piece_(sink_piece(problem.tokens)),
        stage_(p, problem, WindowKernel::backward, problem.kv_heads, 2.5 * band_flops(p, problem),
               threads, problem.sinks > 0 ? piece_ : 1),
        sinks_(p, problem, WindowKernel::sink_gradient, problem.kv_heads, 0, 1) {}
  int64_t bytes() const {
    return scratch() + (problem_.sinks > 0 ? problem_.kv_heads * pieces() * sums_bytes() : 0);
  }
  template <class Fill>
  void run(char* memory, Fill fill) const {
    const auto sums_of = [&](WindowTask& task, const auto& r, int64_t kv_head) {
      const int64_t before = (r.batch * problem_.tokens + r.first) / piece_ + r.sequence;
      task.sink_sums = memory + scratch() + (kv_head * pieces() + before) * sums_bytes();
      task.sink_sums_bytes = sums_bytes();
      task.sink_piece = piece_;
    };
    stage_.run(memory, [&](WindowTask& task, const auto& r, int64_t head, int64_t kv_head) {
      if (problem_.sinks > 0) {
        sums_of(task, r, kv_head);
        task.dq_sink = rows_of(p_.dq_sink, r.batch, head, r.first);
      }
      task.dy = rows_of(p_.dy, r.batch, head, r.first);
      task.d_log_sum = column_of(p_.d_log_sum, r.batch, head, r.first);
      task.dq = rows_of(p_.dq, r.batch, head, r.first);
      task.dk = rows_of(p_.dk, r.batch, kv_head, r.first_key);
      task.dv = rows_of(p_.dv, r.batch, kv_head, r.first_key);
      fill(task, r, head);
    });
    if (problem_.sinks == 0) return;
    sinks_.run(memory, [&](WindowTask& task, const auto& r, int64_t, int64_t kv_head) {
      sums_of(task, r, kv_head);
      task.dk_sink = rows_of(p_.dk_sink, r.sequence, kv_head, 0);
      task.dv_sink = rows_of(p_.dv_sink, r.sequence, kv_head, 0);
    });
  }

 private:
  int64_t scratch() const {
    return stage_.bytes() > sinks_.bytes() ? stage_.bytes() : sinks_.bytes();
  }
  int64_t sums_bytes() const { return sinks_.bytes_per_thread(); }
  // Of one key/value head, so many that every sequence has whole pieces of its own.
  int64_t pieces() const { return problem_.batch * problem_.tokens / piece_ + problem_.sequences; }

  const SlidingWindowBackward& p_;
  const WindowProblem& problem_;
  int64_t piece_;
  Stage<SlidingWindowBackward> stage_, sinks_;
};

class WindowStepCall {
 public:
  WindowStepCall(const SlidingWindowStep& p, const WindowProblem& problem, int threads)
      : p_(p), problem_(problem), group_(problem.heads / problem.kv_heads) {
    const double flops = 2.0 * static_cast<double>(problem.keys) *
                         static_cast<double>((problem.key_dim + problem.dim) * problem.heads) *
                         static_cast<double>(problem.batch);
    // A step is bound by reading the ring, at a quarter of the operations per second or less.
    threads_ = useful_threads(flops / 4, kThreaded ? threads : 1);
    WindowStepTask task = base_task();
    static char placeholder;
    task.gate.data = &placeholder;
    scratch_ = round_to_alignment(kernels().window_step_workspace_bytes(problem.is_double, task));
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
    parallel_for(problem_.batch * problem_.kv_heads, threads_, [&](int64_t i, int thread) {
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
        set_sinks(p_, n, kv_head, task);
      }
      fill(task, n, head);
      kernels().run_window_step(problem_.is_double, task, memory + thread * scratch_);
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
    task.softcap = p_.softcap;
    return task;
  }

  const SlidingWindowStep& p_;
  const WindowProblem& problem_;
  int64_t group_, scratch_ = 0;
  int threads_ = 1;
};

}  // namespace latte::cpu
