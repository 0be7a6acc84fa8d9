// SPDX-License-Identifier: Apache-2.0
// A call becomes tasks, one per group of sequences and block of channels, whose bits depend on
// nothing but their own inputs. Where these are fewer than the threads, long sequences are cut as
// in sequence_parallel.h: segment 0 is scanned while the others but the last are summarised, then
// all the others are scanned from what the summaries before them give.
#include "cpu/mixer_call.h"
#include "latte/latte.h"

namespace latte {
namespace {

using cpu::Range;
using cpu::Recurrence;
using cpu::RecurrenceTask;
using cpu::Rows;

// Flop-equivalents per number, for the threads worth waking.
constexpr double kLinearWork = 8, kGatedWork = 80;

// The token at which the square root of RG-LRU is 1, in the order of the scan; -1: none.
template <class Params>
int64_t first_token(const Params& p, const Range& range, int64_t sequence, bool turned) {
  if (present(p.initial)) {
    if (!present(p.fresh) || !static_cast<const bool*>(p.fresh.data)[sequence * p.fresh.stride[0]])
      return -1;
  }
  if (!present(p.key_mask)) return range.tokens > 0 ? 0 : -1;
  const bool* mask = static_cast<const bool*>(p.key_mask.data) + range.batch * p.key_mask.stride[0];
  for (int64_t i = 0; i < range.tokens; ++i) {
    const int64_t t = turned ? range.tokens - 1 - i : i;
    if (mask[(range.first + t) * p.key_mask.stride[1]]) return i;
  }
  return -1;
}

template <class Params>
void set_mask(RecurrenceTask& task, const Params& p, const Range& range, bool turned) {
  if (!present(p.key_mask)) return;
  task.mask = static_cast<const bool*>(p.key_mask.data) + range.batch * p.key_mask.stride[0] +
              (turned ? range.first + range.tokens - 1 : range.first) * p.key_mask.stride[1];
  task.mask_stride = turned ? -p.key_mask.stride[1] : p.key_mask.stride[1];
}

// What a kind of call is: its tasks, and the kernels that scan and summarise one.
class LinearForwardCall {
 public:
  static constexpr Recurrence kScan = Recurrence::linear_forward;
  static constexpr Recurrence kSummary = Recurrence::linear_summary;
  static constexpr bool kBackward = false, kSums = false;
  static constexpr double kWork = kLinearWork;
  explicit LinearForwardCall(const LinearRecurrenceForward& p) : problem(validate(p)), p_(p) {}
  Range range(int64_t n) const { return cpu::range_of(problem, p_.cu_seqlens, n); }
  const Tensor& output() const { return p_.h; }
  RecurrenceTask task(int64_t n, int64_t c) const {
    const Range r = range(n);
    RecurrenceTask t;
    t.tokens = r.tokens;
    t.a = rows_of(p_.a, r, c, p_.reverse);
    t.b = rows_of(p_.b, r, c, p_.reverse);
    t.h = rows_of(p_.h, r, c, p_.reverse);
    t.initial = cpu::state_of(p_.initial, n, c);
    t.final = cpu::state_of(p_.final, n, c);
    return t;
  }
  const MixerProblem problem;

 private:
  const LinearRecurrenceForward& p_;
};

class LinearBackwardCall {
 public:
  static constexpr Recurrence kScan = Recurrence::linear_backward;
  static constexpr Recurrence kSummary = Recurrence::linear_backward_summary;
  static constexpr bool kBackward = true, kSums = false;
  static constexpr double kWork = 2 * kLinearWork;
  explicit LinearBackwardCall(const LinearRecurrenceBackward& p) : problem(validate(p)), p_(p) {}
  Range range(int64_t n) const { return cpu::range_of(problem, p_.cu_seqlens, n); }
  const Tensor& output() const { return p_.da; }
  RecurrenceTask task(int64_t n, int64_t c) const {
    const Range r = range(n);
    const bool turned = !p_.reverse;
    RecurrenceTask t;
    t.tokens = r.tokens;
    t.a = rows_of(p_.a, r, c, turned);
    t.h = rows_of(p_.h, r, c, turned);
    t.dh = rows_of(p_.dh, r, c, turned);
    t.da = rows_of(p_.da, r, c, turned);
    t.db = rows_of(p_.db, r, c, turned);
    t.initial = cpu::state_of(p_.initial, n, c);
    t.d_final = cpu::state_of(p_.d_final, n, c);
    t.d_initial = cpu::state_of(p_.d_initial, n, c);
    return t;
  }
  const MixerProblem problem;

 private:
  const LinearRecurrenceBackward& p_;
};

class GatedForwardCall {
 public:
  static constexpr Recurrence kScan = Recurrence::gated_forward;
  static constexpr Recurrence kSummary = Recurrence::gated_summary;
  static constexpr bool kBackward = false, kSums = false;
  static constexpr double kWork = kGatedWork;
  explicit GatedForwardCall(const RgLruForward& p) : problem(validate(p)), p_(p) {}
  Range range(int64_t n) const { return cpu::range_of(problem, p_.cu_seqlens, n); }
  const Tensor& output() const { return p_.y; }
  RecurrenceTask task(int64_t n, int64_t c) const {
    const Range r = range(n);
    RecurrenceTask t;
    t.tokens = r.tokens;
    t.b = rows_of(p_.x, r, c, p_.reverse);
    t.gate_a = rows_of(p_.gate_a, r, c, p_.reverse);
    t.gate_x = rows_of(p_.gate_x, r, c, p_.reverse);
    t.h = rows_of(p_.y, r, c, p_.reverse);
    t.log_lambda = cpu::parameter_of(p_.log_lambda, c);
    t.initial = cpu::state_of(p_.initial, n, c);
    t.final = cpu::state_of(p_.final, n, c);
    set_mask(t, p_, r, p_.reverse);
    t.first = first_token(p_, r, n, p_.reverse);
    return t;
  }
  const MixerProblem problem;

 private:
  const RgLruForward& p_;
};

class GatedBackwardCall {
 public:
  static constexpr Recurrence kScan = Recurrence::gated_backward;
  static constexpr Recurrence kSummary = Recurrence::gated_backward_summary;
  static constexpr bool kBackward = true, kSums = true;
  static constexpr double kWork = 2 * kGatedWork;
  explicit GatedBackwardCall(const RgLruBackward& p) : problem(validate(p)), p_(p) {}
  Range range(int64_t n) const { return cpu::range_of(problem, p_.cu_seqlens, n); }
  const Tensor& output() const { return p_.dx; }
  RecurrenceTask task(int64_t n, int64_t c) const {
    const Range r = range(n);
    const bool turned = !p_.reverse;
    RecurrenceTask t;
    t.tokens = r.tokens;
    t.b = rows_of(p_.x, r, c, turned);
    t.gate_a = rows_of(p_.gate_a, r, c, turned);
    t.gate_x = rows_of(p_.gate_x, r, c, turned);
    t.h = rows_of(p_.y, r, c, turned);
    t.dh = rows_of(p_.dy, r, c, turned);
    t.db = rows_of(p_.dx, r, c, turned);
    t.d_gate_a = rows_of(p_.d_gate_a, r, c, turned);
    t.d_gate_x = rows_of(p_.d_gate_x, r, c, turned);
    t.log_lambda = cpu::parameter_of(p_.log_lambda, c);
    t.initial = cpu::state_of(p_.initial, n, c);
    t.d_final = cpu::state_of(p_.d_final, n, c);
    t.d_initial = cpu::state_of(p_.d_initial, n, c);
    set_mask(t, p_, r, turned);
    const int64_t first = first_token(p_, r, n, p_.reverse);
    t.first = first < 0 ? -1 : r.tokens - 1 - first;
    return t;
  }
  RecurrenceTask task_of_parameters(int64_t c) const {
    RecurrenceTask t;
    t.log_lambda = cpu::parameter_of(p_.log_lambda, c);
    t.d_log_lambda = cpu::parameter_of(p_.d_log_lambda, c);
    return t;
  }
  const MixerProblem problem;

 private:
  const RgLruBackward& p_;
};

// Tokens [begin, end) of a task, in the order of the scan.
RecurrenceTask segment_of(RecurrenceTask t, int64_t begin, int64_t end, bool backward) {
  // Backward, the h before the segment's last token is the one that the next segment starts with.
  if (backward && end < t.tokens) t.initial = shifted(t.h, end, 0);
  for (Rows* rows :
       {&t.a, &t.b, &t.h, &t.gate_a, &t.gate_x, &t.dh, &t.da, &t.db, &t.d_gate_a, &t.d_gate_x})
    *rows = shifted(*rows, begin, 0);
  if (t.mask != nullptr) t.mask += begin * t.mask_stride;
  t.first -= begin;
  t.tokens = end - begin;
  return t;
}

// Workspace: scratch per thread; two rows of summary per segment, sequence and block; a row of
// partial sums per group, or per segment where sequences are cut.
template <class Call>
class Plan {
 public:
  Plan(const Call& call, int threads)
      : call_(call), threads_(useful_threads(call, threads)), grid_(call.problem, threads_) {
    const MixerProblem& p = call.problem;
    for (int64_t n = 0; n < p.sequences; ++n) {
      total_ += call.range(n).tokens;
      if (call.range(n).tokens > longest_) longest_ = call.range(n).tokens;
    }
    element_ = p.is_double ? 8 : 4;
    scratch_ = cpu::round_to_alignment(
        cpu::kernels().recurrence_bytes(Call::kScan, p.is_double, grid_.block_width()));
    parts_ = parts_of(longest_);
    const Tensor& out = call.output();
    stream_ = p.batch * p.tokens * p.channels * element_size(out.dtype) >= cpu::kStreamBytes;
  }

  int64_t bytes() const {
    return threads_ * scratch_ + grid_.groups() * grid_.blocks() * slots() * slot_bytes() +
           partial_rows() * partial_stride() * (Call::kSums ? 8 : 0);
  }

  void run(char* base) const {
    parts_ > 1 ? run_cut(base) : run_whole(base);
    if constexpr (Call::kSums) reduce(base);
  }

 private:
  static int useful_threads(const Call& call, int threads) {
    const MixerProblem& p = call.problem;
    const double numbers = static_cast<double>(p.batch) * static_cast<double>(p.tokens) *
                           static_cast<double>(p.channels);
    return cpu::useful_threads(Call::kWork * numbers, cpu::kThreaded ? threads : 1);
  }
  int64_t parts_of(int64_t tokens) const {
    // Groups of several sequences are tasks enough.
    if (grid_.groups() < call_.problem.sequences) return 1;
    return cpu::parts(tokens, total_ * grid_.blocks(), threads_);
  }
  int64_t slots() const { return parts_ > 1 ? parts_ : 0; }
  // Two rows of a block; the first block is the widest.
  int64_t slot_bytes(int64_t block = 0) const {
    return 2 * cpu::padded_channels(grid_.channels(block)) * element_;
  }
  int64_t partial_rows() const { return grid_.groups() * (parts_ > 1 ? parts_ + 1 : 1); }
  int64_t partial_stride() const { return cpu::padded_channels(call_.problem.channels); }
  double* partial(char* base, int64_t row, int64_t c) const {
    char* const sums =
        base + threads_ * scratch_ + grid_.groups() * grid_.blocks() * slots() * slot_bytes();
    return reinterpret_cast<double*>(sums) + row * partial_stride() + c;
  }

  void scan(Recurrence kernel, RecurrenceTask& task, int64_t block, char* scratch) const {
    task.channels = grid_.channels(block);
    task.stream = stream_;
    cpu::kernels().recurrence(kernel, call_.problem.is_double, task, scratch);
  }

  void run_whole(char* base) const {
    const int64_t tasks = grid_.groups() * grid_.blocks();
    cpu::parallel_for(tasks, threads_, [&](int64_t i, int thread) {
      const int64_t group = i / grid_.blocks(), block = i % grid_.blocks();
      const int64_t c = grid_.first_channel(block);
      for (int64_t n = grid_.border(group); n < grid_.border(group + 1); ++n) {
        RecurrenceTask task = call_.task(n, c);
        task.partial = partial(base, group, c);
        task.accumulate = n > grid_.border(group);
        scan(Call::kScan, task, block, base + thread * scratch_);
      }
    });
  }

  // Every group is one sequence here.
  void run_cut(char* base) const {
    for (int phase = 0; phase < 2; ++phase) {
      const int64_t stages = parts_ + (phase == 0 ? 0 : 1);
      const int64_t tasks = grid_.groups() * grid_.blocks() * stages;
      cpu::parallel_for(tasks, threads_, [&](int64_t i, int thread) {
        const int64_t stage = i % stages, slot = i / stages;
        run_stage(phase, slot / grid_.blocks(), slot % grid_.blocks(), stage, base,
                  base + thread * scratch_);
      });
    }
  }

  void run_stage(int phase, int64_t n, int64_t block, int64_t stage, char* base,
                 char* scratch) const {
    const int64_t tokens = call_.range(n).tokens, parts = parts_of(tokens);
    const int64_t last = parts > 1 ? parts : 0;  // the last segment
    if (stage > last || (phase == 0 && stage > 0 && stage == last) || (phase == 1 && stage == 0))
      return skip_stage(phase, n, block, stage, last, base);
    const int64_t c = grid_.first_channel(block);
    RecurrenceTask task = call_.task(n, c);
    if (last > 0)
      task = segment_of(task, cpu::forward_cut(stage, parts, tokens),
                        cpu::forward_cut(stage + 1, parts, tokens), Call::kBackward);
    char* const slots_base =
        base + threads_ * scratch_ + (n * grid_.blocks() + block) * slots() * slot_bytes();
    const DType type = call_.problem.is_double ? DType::float64 : DType::float32;
    // Segment 0 leaves its carry in the second row of its slot.
    const Rows carry{slots_base + slot_bytes(block) / 2, type, 0, 0, 1};
    Rows& in = Call::kBackward ? task.d_final : task.initial;
    Rows& out = Call::kBackward ? task.d_initial : task.final;
    if (stage > 0) {
      in = carry;
      task.summaries = slots_base + slot_bytes(block);
      task.summary_count = stage - 1;
    }
    if (stage < last) out = stage == 0 ? carry : Rows{};
    task.partial = partial(base, n * (parts_ + 1) + stage, c);
    if (phase == 0 && stage > 0) {
      task.summary = slots_base + stage * slot_bytes(block);
      task.summary_count = 0;
      return scan(Call::kSummary, task, block, scratch);
    }
    scan(Call::kScan, task, block, scratch);
  }

  // A segment that a shorter sequence does not have adds nothing to the sums.
  void skip_stage(int phase, int64_t n, int64_t block, int64_t stage, int64_t last,
                  char* base) const {
    if (!Call::kSums || phase == 0 || stage <= last) return;
    double* const sums = partial(base, n * (parts_ + 1) + stage, grid_.first_channel(block));
    for (int64_t c = 0; c < grid_.channels(block); ++c) sums[c] = 0;
  }

  void reduce(char* base) const {
    for (int64_t block = 0; block < grid_.blocks(); ++block) {
      const int64_t c = grid_.first_channel(block);
      RecurrenceTask task = call_.task_of_parameters(c);
      task.partial = partial(base, 0, c);
      task.partials = partial_rows();
      task.partial_stride = partial_stride();
      scan(Recurrence::gated_reduce, task, block, base);
    }
  }

  const Call& call_;
  int threads_;
  cpu::Grid grid_;
  int64_t total_ = 0, longest_ = 0, element_ = 4, scratch_ = 0, parts_ = 1;
  bool stream_ = false;
};

}  // namespace

int64_t workspace_bytes(const LinearRecurrenceForward& params, int threads) {
  return cpu::call_workspace<Plan, LinearForwardCall>(params, "linear_recurrence", threads);
}
int64_t workspace_bytes(const LinearRecurrenceBackward& params, int threads) {
  return cpu::call_workspace<Plan, LinearBackwardCall>(params, "linear_recurrence_backward",
                                                       threads);
}
int64_t workspace_bytes(const RgLruForward& params, int threads) {
  return cpu::call_workspace<Plan, GatedForwardCall>(params, "rg_lru", threads);
}
int64_t workspace_bytes(const RgLruBackward& params, int threads) {
  return cpu::call_workspace<Plan, GatedBackwardCall>(params, "rg_lru_backward", threads);
}

void linear_recurrence_forward(const LinearRecurrenceForward& params, void* workspace,
                               int threads) {
  cpu::run_call<Plan, LinearForwardCall>(params, "linear_recurrence", workspace, threads);
}
void linear_recurrence_backward(const LinearRecurrenceBackward& params, void* workspace,
                                int threads) {
  cpu::run_call<Plan, LinearBackwardCall>(params, "linear_recurrence_backward", workspace, threads);
}
void rg_lru_forward(const RgLruForward& params, void* workspace, int threads) {
  cpu::run_call<Plan, GatedForwardCall>(params, "rg_lru", workspace, threads);
}
void rg_lru_backward(const RgLruBackward& params, void* workspace, int threads) {
  cpu::run_call<Plan, GatedBackwardCall>(params, "rg_lru_backward", workspace, threads);
}

}  // namespace latte
