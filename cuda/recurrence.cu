// SPDX-License-Identifier: Apache-2.0
#include "common/validate_mixers.h"
#include "cuda/call.h"
#include "cuda/recurrence.cuh"
#include "cuda/rg_lru.cuh"
#include "cuda/sum.cuh"
#include "latte/cuda.h"

namespace latte::cuda {
namespace {

// A call of `Op`, one of LinearForward and its kind: its kernels' parameters, and their launches.
template <template <class> class Op>
class Plan {
 public:
  template <class Params>
  Plan(const char* op, const Params& params) : op_(op) {
    const MixerProblem p = validate(params, Memory::device);
    is_double_ = p.is_double;
    kernel.sequences = Sequences(params.cu_seqlens, p.sequences, p.tokens);
    kernel.channels = p.channels;
    kernel.segment = scan_segment(p.sequences * p.channels, p.tokens);
    kernel.segments = most(ceil_div(p.tokens, kernel.segment), 1);
    kernel.initial = rows_of(params.initial);
    kernel.turned = Op<float>::kBackward != params.reverse;
    sequences_ = p.sequences;
  }

  void place(Workspace& workspace) {
    const int64_t slots = sequences_ * kernel.segments * kernel.channels;
    const int64_t size = is_double_ ? 8 : 4;
    if (kernel.segments > 1) kernel.summaries = workspace.take<char>(2 * slots * size);
    if (Op<float>::kSums) kernel.partial = workspace.take<char>(slots * size);
    if (kernel.mask && (!kernel.initial.data || kernel.fresh))
      kernel.first_token = workspace.take<int64_t>(sequences_);
  }

  void run(void* stream) const {
    with_compute_type(is_double_, [&](auto type) { run<typename decltype(type)::type>(stream); });
  }

  RecurrenceParams kernel;

 private:
  template <class T>
  void run(void* stream) const {
    if (kernel.first_token)
      launch_blocks(op_, find_first, sequences_, dim3(kChannelThreads), kFindShared, stream, kernel,
                    kernel.turned != Op<T>::kBackward);
    if (kernel.segments > 1) scan(recurrence<Op<T>, true>, stream);
    scan(recurrence<Op<T>, false>, stream);
    if constexpr (Op<T>::kSums)
      launch_blocks(op_, sum_rows<T, WriteLambdaGradient<T>>,
                    ceil_div(kernel.channels, kSumColumns), dim3(kSumColumns, kSumRows), kSumShared,
                    stream, static_cast<const T*>(kernel.partial), sequences_ * kernel.segments,
                    kernel.channels, WriteLambdaGradient<T>{kernel});
  }
  void scan(void (*pass)(RecurrenceParams), void* stream) const {
    const int threads = channel_threads(kernel.channels);
    launch_blocks(op_, pass, sequences_ * kernel.segments * ceil_div(kernel.channels, threads),
                  dim3(static_cast<unsigned>(threads)), 0, stream, kernel);
  }

  const char* op_;
  bool is_double_ = false;
  int64_t sequences_ = 0;
};

constexpr const char* kLinearForward = "linear_recurrence";
constexpr const char* kLinearBackward = "linear_recurrence_backward";
constexpr const char* kGatedForward = "rg_lru";
constexpr const char* kGatedBackward = "rg_lru_backward";

auto plan_of(const LinearRecurrenceForward& p) {
  Plan<LinearForward> plan(kLinearForward, p);
  RecurrenceParams& k = plan.kernel;
  k.a = rows_of(p.a), k.b = rows_of(p.b), k.h = rows_of(p.h);
  k.final = rows_of(p.final);
  return plan;
}
auto plan_of(const LinearRecurrenceBackward& p) {
  Plan<LinearBackward> plan(kLinearBackward, p);
  RecurrenceParams& k = plan.kernel;
  k.a = rows_of(p.a), k.h = rows_of(p.h), k.dh = rows_of(p.dh);
  k.da = rows_of(p.da), k.db = rows_of(p.db);
  k.d_final = rows_of(p.d_final), k.d_initial = rows_of(p.d_initial);
  return plan;
}

template <class Params>
void set_gates(RecurrenceParams& k, const Params& p) {
  k.b = rows_of(p.x), k.gate_a = rows_of(p.gate_a), k.gate_x = rows_of(p.gate_x);
  k.h = rows_of(p.y);
  k.log_lambda = parameter_of(p.log_lambda);
  if (present(p.key_mask)) {
    k.mask = static_cast<const bool*>(p.key_mask.data);
    k.mask_stride_b = p.key_mask.stride[0], k.mask_stride_t = p.key_mask.stride[1];
  }
  if (present(p.fresh)) {
    k.fresh = static_cast<const bool*>(p.fresh.data);
    k.fresh_stride = p.fresh.stride[0];
  }
}
auto plan_of(const RgLruForward& p) {
  Plan<GatedForward> plan(kGatedForward, p);
  set_gates(plan.kernel, p);
  plan.kernel.final = rows_of(p.final);
  return plan;
}
auto plan_of(const RgLruBackward& p) {
  Plan<GatedBackward> plan(kGatedBackward, p);
  RecurrenceParams& k = plan.kernel;
  set_gates(k, p);
  k.dh = rows_of(p.dy), k.db = rows_of(p.dx);
  k.d_gate_a = rows_of(p.d_gate_a), k.d_gate_x = rows_of(p.d_gate_x);
  k.d_log_lambda = parameter_of(p.d_log_lambda);
  k.d_final = rows_of(p.d_final), k.d_initial = rows_of(p.d_initial);
  return plan;
}

}  // namespace

int64_t workspace_bytes(const LinearRecurrenceForward& params) {
  return workspace_of(plan_of(params));
}
int64_t workspace_bytes(const LinearRecurrenceBackward& params) {
  return workspace_of(plan_of(params));
}
int64_t workspace_bytes(const RgLruForward& params) { return workspace_of(plan_of(params)); }
int64_t workspace_bytes(const RgLruBackward& params) { return workspace_of(plan_of(params)); }

void linear_recurrence_forward(const LinearRecurrenceForward& params, void* workspace,
                               void* stream) {
  run_plan(kLinearForward, plan_of(params), workspace, stream);
}
void linear_recurrence_backward(const LinearRecurrenceBackward& params, void* workspace,
                                void* stream) {
  run_plan(kLinearBackward, plan_of(params), workspace, stream);
}
void rg_lru_forward(const RgLruForward& params, void* workspace, void* stream) {
  run_plan(kGatedForward, plan_of(params), workspace, stream);
}
void rg_lru_backward(const RgLruBackward& params, void* workspace, void* stream) {
  run_plan(kGatedBackward, plan_of(params), workspace, stream);
}

}  // namespace latte::cuda
