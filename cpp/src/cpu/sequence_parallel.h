// SPDX-License-Identifier: Apache-2.0
// One long sequence on several threads. It is cut into segments whose stages run in phases, with a
// barrier between two phases. Segments meet in states (merge is associative, so the state before a
// segment is the merge of the summaries before it) and, going backward, in carries: R and c of the
// queries after a cut (causal.h), or H (bidirectional.h).
#pragma once

#include "cpu/heuristics.h"
#include "cpu/kernels.h"

namespace latte::cpu {

// Room for a state or a carry per slot, in the compute type.
class Slots {
 public:
  Slots(char* base, int64_t latents, int64_t dim, int64_t element_size)
      : base_(base), latents_(latents), dim_(dim), element_size_(element_size) {}

  static int64_t bytes(int64_t latents, int64_t dim, int64_t element_size) {
    return (latents * (dim + 2) * element_size + 63) / 64 * 64;
  }
  HeadState operator[](int64_t i) const {
    char* const slot = base_ + i * bytes(latents_, dim_, element_size_);
    HeadState s;
    s.max = slot;
    s.norm = slot + latents_ * element_size_;
    s.mean = slot + 2 * latents_ * element_size_;
    s.max_stride = s.norm_stride = s.mean_stride_d = 1;
    s.mean_stride_l = dim_;
    return s;
  }

 private:
  char* base_;
  int64_t latents_, dim_, element_size_;
};

// A task cut for `parts` threads.
struct CutTask {
  HeadTask task;
  int64_t parts;
  Slots slots;
};

// Runs the kernels of a stage on one thread.
struct StageRunner {
  const KernelTable& kernels;
  bool is_double;
  void* scratch;

  void operator()(Kernel kernel, const HeadTask& task) const {
    kernels.run(kernel, is_double, task, scratch);
  }
};

inline HeadTask segment(const CutTask& cut, int64_t begin, int64_t end) {
  HeadTask task = cut.task;
  task.begin = begin;
  task.end = end;
  task.final = {};
  return task;
}
inline HeadTask forward_segment(const CutTask& cut, int64_t i) {
  return segment(cut, forward_cut(i, cut.parts, cut.task.tokens),
                 forward_cut(i + 1, cut.parts, cut.task.tokens));
}
inline HeadTask reverse_segment(const CutTask& cut, int64_t i) {
  return segment(cut, reverse_cut(i, cut.parts, cut.task.tokens),
                 reverse_cut(i + 1, cut.parts, cut.task.tokens));
}
inline HeadTask even_segment(const CutTask& cut, int64_t i) {
  return segment(cut, even_cut(i, cut.parts, cut.task.tokens),
                 even_cut(i + 1, cut.parts, cut.task.tokens));
}

inline void summarise_keys(HeadTask task, const HeadState& into, const StageRunner& run) {
  task.initial = {};
  task.final = into;
  run(Kernel::key_summary, task);
}
inline void merge_into(HeadTask task, const HeadState& from, const HeadState& into,
                       const StageRunner& run) {
  task.initial = from;
  task.other = task.final = into;
  run(Kernel::merge_states, task);
}
inline void merge_carry_into(HeadTask task, const HeadState& from, const HeadState& into,
                             const StageRunner& run) {
  task.carry_in = from;
  task.carry_out = into;
  run(Kernel::merge_carries, task);
}

// Each operation: phases, the stages of a phase for n parts, the slots that it needs, and stage i
// of a phase.

// A call whose sequences are never cut.
struct NoStages {
  static constexpr int kPhases = 1;
  static int64_t stages(int, int64_t) { return 1; }
  static int64_t slots(int64_t) { return 0; }
  static void run_stage(const CutTask&, int, int64_t, const StageRunner&) {}
};

// The state before segment i waits in slot i, 1 <= i <= n.
template <Kernel kScan>
inline void causal_prefix_stage(const CutTask& cut, int phase, int64_t i, const HeadState& last,
                                const StageRunner& run) {
  const int64_t n = cut.parts;
  if (phase == 0 && i > 0) {
    summarise_keys(forward_segment(cut, i), cut.slots[i + 1], run);
  } else if (phase == 1) {
    for (int64_t j = 1; j < n; ++j) merge_into(cut.task, cut.slots[j], cut.slots[j + 1], run);
  } else {
    const int64_t index = phase == 0 ? 0 : i + 1;
    HeadTask task = forward_segment(cut, index);
    if (index > 0) task.initial = cut.slots[index];
    task.final = index == n ? last : index == 0 ? cut.slots[1] : HeadState();
    run(kScan, task);
  }
}

struct CausalForwardStages {
  static constexpr int kPhases = 3;
  static int64_t stages(int phase, int64_t n) { return phase == 1 ? 1 : n; }
  static int64_t slots(int64_t n) { return n + 1; }
  static void run_stage(const CutTask& cut, int phase, int64_t i, const StageRunner& run) {
    causal_prefix_stage<Kernel::causal_forward>(cut, phase, i, cut.task.final, run);
  }
};

// After pass F, the final state waits in slot n + 1; the carry at the begin of reverse segment i in
// slot n + 1 + i, 1 <= i <= n.
struct CausalBackwardStages {
  static constexpr int kPhases = 6;
  static int64_t stages(int phase, int64_t n) { return phase == 1 || phase == 4 ? 1 : n; }
  static int64_t slots(int64_t n) { return 2 * n + 2; }
  static void run_stage(const CutTask& cut, int phase, int64_t i, const StageRunner& run) {
    const int64_t n = cut.parts;
    const auto carry = [&](int64_t j) { return cut.slots[n + 1 + j]; };
    if (phase < 3) {
      causal_prefix_stage<Kernel::causal_gradient_forward>(cut, phase, i, cut.slots[n + 1], run);
    } else if (phase == 3) {
      HeadTask task = reverse_segment(cut, n - i);
      task.carry_out = carry(n - i);
      task.final = cut.slots[n + 1];
      run(i == 0 ? Kernel::causal_gradient_reverse : Kernel::causal_gradient_summary, task);
    } else if (phase == 4) {
      for (int64_t j = n - 1; j > 0; --j) merge_carry_into(cut.task, carry(j + 1), carry(j), run);
    } else {
      HeadTask task = reverse_segment(cut, i);
      task.carry_in = carry(i + 1);
      run(Kernel::causal_gradient_reverse, task);
    }
  }
};

// The state of segment i waits in slot i, that of all keys in slot 0.
inline void even_summary_stage(const CutTask& cut, int phase, int64_t i, const StageRunner& run) {
  if (phase == 0) {
    summarise_keys(even_segment(cut, i), cut.slots[i], run);
  } else {
    for (int64_t j = 1; j < cut.parts; ++j) merge_into(cut.task, cut.slots[j], cut.slots[0], run);
  }
}

struct BidirectionalForwardStages {
  static constexpr int kPhases = 3;
  static int64_t stages(int phase, int64_t n) { return phase == 1 ? 1 : n; }
  static int64_t slots(int64_t n) { return n; }
  static void run_stage(const CutTask& cut, int phase, int64_t i, const StageRunner& run) {
    if (phase < 2) return even_summary_stage(cut, phase, i, run);
    HeadTask task = even_segment(cut, i);
    task.initial = cut.slots[0];
    if (i == 0) task.final = cut.task.final;
    run(Kernel::bidirectional_output, task);
  }
};

// H of segment i waits in slot n + i, that of all queries in slot n.
struct BidirectionalBackwardStages {
  static constexpr int kPhases = 5;
  static int64_t stages(int phase, int64_t n) { return phase == 1 || phase == 3 ? 1 : n; }
  static int64_t slots(int64_t n) { return 2 * n; }
  static void run_stage(const CutTask& cut, int phase, int64_t i, const StageRunner& run) {
    const int64_t n = cut.parts;
    const auto share = [&](int64_t j) {
      HeadState s = cut.slots[n + j];
      s.max = s.norm = nullptr;
      return s;
    };
    if (phase < 2) return even_summary_stage(cut, phase, i, run);
    if (phase == 3) {
      for (int64_t j = 1; j < n; ++j) merge_carry_into(cut.task, share(j), share(0), run);
      return;
    }
    HeadTask task = even_segment(cut, i);
    task.initial = cut.slots[0];
    task.carry_out = share(i);
    task.carry_in = share(0);
    run(phase == 2 ? Kernel::bidirectional_gather : Kernel::bidirectional_spread, task);
  }
};

}  // namespace latte::cpu
