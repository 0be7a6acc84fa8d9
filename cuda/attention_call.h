// SPDX-License-Identifier: Apache-2.0
// What the drivers of the forward and the backward pass share: the arguments of a call, and the
// states between the parts of its sequences.
#pragma once

#include <initializer_list>
#include <string>

#include "cuda/attention_launch.h"
#include "cuda/call.h"
#include "cuda/segments.h"

namespace latte::cuda {

// Dense states in a workspace.
inline StateView take_states(Workspace& workspace, int64_t count, const Problem& p) {
  const int64_t head = p.latents, sequence = p.kv_heads * p.latents, rows = count * sequence;
  StateView out;
  out.max = {workspace.take<float>(rows), {sequence, head, 1}};
  out.norm = {workspace.take<float>(rows), {sequence, head, 1}};
  out.mean = {workspace.take<float>(rows * p.dim), {sequence * p.dim, head * p.dim, p.dim, 1}};
  return out;
}

// Types that differ meet in float32, which holds them all.
inline DType kernel_type_of(std::initializer_list<DType> dtypes) {
  for (const DType dtype : dtypes)
    if (dtype != *dtypes.begin()) return DType::float32;
  return *dtypes.begin();
}

inline void check_limits(const char* op, const Problem& p) {
  const std::string start = std::string("[") + op + "] ";
  if (p.is_double)
    throw Error(Error::Kind::type,
                start + "q has dtype float64, expected float32, bfloat16 or float16 on CUDA");
  if (p.latents > kMaxLatents || p.dim > kMaxDim)
    throw Error(Error::Kind::value, start + "q, v have " + std::to_string(p.latents) +
                                        " latents and " + std::to_string(p.dim) +
                                        " channels, expected at most 256 of each on CUDA");
}

// The inputs that the passes share.
template <class Params>
AttentionArgs attention_args(const Params& p, const Problem& problem, DType kernel_type) {
  AttentionArgs args;
  args.q = input_rows(p.q, kernel_type), args.k = input_rows(p.k, kernel_type);
  args.v = input_rows(p.v, kernel_type);
  if (present(p.key_mask)) {
    args.key_mask = static_cast<const bool*>(p.key_mask.data);
    args.mask_stride_b = p.key_mask.stride[0], args.mask_stride_t = p.key_mask.stride[1];
  }
  args.sequences = Sequences(p.cu_seqlens, problem.sequences, problem.tokens);
  args.heads = static_cast<int>(problem.heads);
  args.kv_heads = static_cast<int>(problem.kv_heads);
  args.latents = static_cast<int>(problem.latents);
  args.dim = static_cast<int>(problem.dim);
  args.scale = static_cast<float>(p.scale);
  return args;
}

// Calls f(Type<E>()), E the element type of a kernel.
template <class F>
void with_element_type(DType dtype, F f) {
  with_type(dtype, [&](auto type) {
    if constexpr (!std::is_same_v<typename decltype(type)::type, double>) f(type);
  });
}

// How a forward pass cuts L and D over blocks, by shape, type and the device's shared memory.
struct ForwardSlices {
  int latents;  // of a block
  int slices, latent_slices;

  ForwardSlices(const Problem& p, DType kernel_type, int64_t limit)
      : latents(forward_latents(p.latents, kernel_type, limit)),
        slices(static_cast<int>(ceil_div(p.dim, value_slice(latents, kernel_type)))),
        latent_slices(static_cast<int>(ceil_div(p.latents, latents))) {}
  int64_t blocks() const { return int64_t{slices} * latent_slices; }
};

// The workspace of a plan that depends on the device's shared memory, on any device.
template <class Plan, class Params>
int64_t workspace_of_any(const Params& params) {
  int64_t bytes = 0;
  for (const int64_t limit : kSharedLimits) bytes = most(bytes, workspace_of(Plan(params, limit)));
  return bytes;
}

// The states of the keys of `parts` parts of every sequence, folded into those before each part,
// or, bidirectional, into that of the whole sequence.
class KeyStates {
 public:
  KeyStates(const char* op, const AttentionArgs& args, DType kernel_type, const Problem& problem,
            const ForwardSlices& cut, bool causal, int parts)
      : op_(op),
        args_(args),
        type_(kernel_type),
        problem_(problem),
        latents_(cut.latents),
        causal_(causal),
        parts_(parts) {
    args_.slices = cut.slices, args_.latent_slices = cut.latent_slices;
    args_.parts = parts, args_.walked = summarised();
    args_.final_of_part = true;
  }

  // `final`, if there, receives the whole sequence's.
  void place(Workspace& workspace, const State& final) {
    if (summarised() > 0) before_ = take_states(workspace, problem_.sequences * parts_, problem_);
    if (!causal_)
      total_ = present(final.mean) ? view_of(final)
                                   : take_states(workspace, problem_.sequences, problem_);
  }

  void run(const StateView& initial, void* stream) const {
    if (summarised() == 0) return;
    AttentionArgs a = args_;
    a.final = before_;
    const int64_t heads = problem_.sequences * problem_.kv_heads;
    with_element_type(type_, [&](auto type) {
      launch_attention<typename decltype(type)::type>(AttentionKernel::key_summary, a, latents_,
                                                      heads * a.walked * a.slices * a.latent_slices,
                                                      stream);
    });
    FoldArgs f;
    f.parts = before_, f.total = total_, f.initial = initial;
    f.kv_heads = a.kv_heads, f.latents = a.latents, f.dim = a.dim;
    f.count = summarised(), f.stride = parts_;
    f.writes_prefixes = causal_;
    launch_fold(op_, f, heads * a.latents, stream);
  }

  // Before every part, absent where the only one starts from the initial state.
  const StateView& before() const { return before_; }
  const StateView& total() const { return total_; }

 private:
  // The last part of a causal sequence comes before no other.
  int summarised() const { return causal_ ? parts_ - 1 : parts_; }

  const char* op_;
  AttentionArgs args_;
  DType type_;
  Problem problem_;
  int latents_;  // of a block
  bool causal_;
  int parts_;
  StateView before_, total_;
};

}  // namespace latte::cuda
