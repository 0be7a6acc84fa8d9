// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string>

#include "cuda/attention_blocks.h"
#include "cuda/window_call.h"

namespace latte::cuda {
namespace {

// Types that differ meet in float32, which holds them all.
DType common_type(std::initializer_list<const Tensor*> tensors) {
  const DType first = (*tensors.begin())->dtype;
  const bool same = std::all_of(tensors.begin(), tensors.end(),
                                [&](const Tensor* t) { return !present(*t) || t->dtype == first; });
  return same ? first : DType::float32;
}

template <class Params>
WindowArgs window_args(const Params& p, const WindowProblem& problem, DType type) {
  WindowArgs a;
  a.q = input_rows(p.q, type), a.k = input_rows(p.k, type), a.v = input_rows(p.v, type);
  a.q_sink = input_rows(p.q_sink, type), a.k_sink = input_rows(p.k_sink, type);
  a.v_sink = input_rows(p.v_sink, type);
  a.log_sum = view_of(p.log_sum);
  if (present(p.key_mask)) {
    a.key_mask = static_cast<const bool*>(p.key_mask.data);
    a.mask_stride_b = p.key_mask.stride[0], a.mask_stride_s = p.key_mask.stride[1];
  }
  if (present(p.sink_position)) {
    a.sink_position = static_cast<const int64_t*>(p.sink_position.data);
    a.position_stride_n = p.sink_position.stride[0];
    a.position_stride_i = p.sink_position.stride[1];
  }
  if (present(p.start)) {
    a.start = static_cast<const int64_t*>(p.start.data);
    a.start_stride = p.start.stride[0];
  }
  a.sequences = Sequences(p.cu_seqlens, problem.sequences, problem.tokens);
  a.heads = static_cast<int>(problem.heads), a.kv_heads = static_cast<int>(problem.kv_heads);
  a.key_dim = static_cast<int>(problem.key_dim), a.dim = static_cast<int>(problem.dim);
  a.sinks = static_cast<int>(problem.sinks);
  a.past = p.past, a.reach = p.window;
  a.before = least(p.window, most(problem.keys, 1)) - 1;
  a.after = p.causal ? 0 : a.before;
  a.causal = p.causal;
  a.scale = static_cast<float>(p.scale), a.softcap = static_cast<float>(p.softcap);
  return a;
}

int64_t query_slots(const WindowProblem& p) { return tile_slots(p.tokens, p.sequences, p.packed); }
int64_t key_slots(const WindowProblem& p) { return tile_slots(p.keys, p.sequences, p.packed); }

void launch(DType type, WindowKernel kernel, const WindowArgs& args, int64_t blocks, void* stream) {
  with_type(type, [&](auto tag) {
    using E = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<E, double>) launch_window<E>(kernel, args, blocks, stream);
  });
}

}  // namespace

void check_channels(const char* op, const WindowProblem& problem) {
  if (problem.key_dim > kMaxDim || problem.dim > kMaxDim)
    throw Error(Error::Kind::value, std::string("[") + op + "] q, v have " +
                                        std::to_string(problem.key_dim) + " and " +
                                        std::to_string(problem.dim) +
                                        " channels, expected at most 256 of each on CUDA");
}

void check_window(const char* op, const WindowProblem& problem) {
  check_channels(op, problem);
  if (problem.is_double)
    throw Error(Error::Kind::type,
                std::string("[") + op +
                    "] q has dtype float64, expected float32, bfloat16 or float16 on CUDA");
}

WindowForwardPlan::WindowForwardPlan(const SlidingWindowForward& p, const WindowProblem& problem)
    : type_(common_type({&p.q, &p.k, &p.v, &p.q_sink, &p.k_sink, &p.v_sink})),
      blocks_(problem.batch * problem.heads * query_slots(problem)) {
  args = window_args(p, problem, type_);
  args.y = output_rows(p.y), args.wide = output_rows(p.wide);
  args.slots = query_slots(problem);
}

void WindowForwardPlan::run(void* stream) const {
  launch(type_, WindowKernel::forward, args, blocks_, stream);
}

WindowBackwardPlan::WindowBackwardPlan(const SlidingWindowBackward& p, const WindowProblem& problem)
    : problem_(problem),
      type_(common_type({&p.q, &p.k, &p.v, &p.dy, &p.q_sink, &p.k_sink, &p.v_sink})),
      channels_(channel_tile(most(problem.key_dim, problem.dim))),
      dk_sink_(output_rows(p.dk_sink)),
      dv_sink_(output_rows(p.dv_sink)) {
  args = window_args(p, problem, type_);
  args.dy = input_rows(p.dy, type_);
  args.dq = output_rows(p.dq), args.dk = output_rows(p.dk), args.dv = output_rows(p.dv);
  args.dq_sink = output_rows(p.dq_sink);
  args.slices = static_cast<int>(ceil_div(most(args.key_dim, args.dim), gradient_slice(channels_)));
  const int64_t owners =
      problem.sequences * problem.kv_heads * ceil_div(problem.sinks, kOwnRows) * args.slices;
  args.pieces = static_cast<int>(token_parts(owners, problem.tokens, tuning()));
  rows.dy = args.dy, rows.wide = head_rows(p.wide, false);
  rows.d_log_sum = view_of(p.d_log_sum);
  rows.rows = problem.batch * problem.heads * problem.tokens, rows.tokens = problem.tokens;
  rows.heads = args.heads, rows.dim = args.dim;
}

void WindowBackwardPlan::place(Workspace& workspace) {
  const WindowProblem& p = problem_;
  rows.delta = {workspace.take<float>(rows.rows), {p.heads * p.tokens, p.tokens, 1, 0}};
  args.delta = rows.delta;
  args.sink_sums =
      workspace.take<float>(args.pieces * p.sequences * p.kv_heads * p.sinks * (p.key_dim + p.dim));
}

void WindowBackwardPlan::check_device(const char* op) const {
  const WindowBytes bytes = window_bytes(element_size(type_), channels_, 2);
  device_stages(op, bytes.stage, bytes.own);
}

void WindowBackwardPlan::run_window(void* stream) const {
  const WindowProblem& p = problem_;
  WindowArgs a = args;
  a.slots = query_slots(p);
  launch(type_, WindowKernel::query_gradient, a, p.batch * p.heads * a.slots, stream);
  a.slots = key_slots(p);
  launch(type_, WindowKernel::key_gradient, a, p.batch * p.kv_heads * a.slots * a.slices, stream);
  if (p.sinks == 0) return;
  launch(type_, WindowKernel::sink_gradient, a,
         p.sequences * p.kv_heads * ceil_div(p.sinks, kOwnRows) * a.pieces * a.slices, stream);
  launch_sink_sums(a, p.sequences, dk_sink_, dv_sink_, stream);
}

}  // namespace latte::cuda
