// SPDX-License-Identifier: Apache-2.0
// One call becomes blocks, one per sequence, head and slice of D; a sequence so long that most of
// the device would be idle is cut into parts: their summaries, the states before each of them, and
// then the same kernel from those states.
#include "cuda/attention_launch.h"
#include "cuda/call.h"
#include "cuda/segments.cuh"
#include "latte/cuda.h"

namespace latte::cuda {
namespace {

constexpr const char* kOp = "latent_attention";

// Dense states in a workspace.
StateView take_states(Workspace& workspace, int64_t count, const Problem& p) {
  const int64_t head = p.latents, sequence = p.kv_heads * p.latents, rows = count * sequence;
  StateView out;
  out.max = {workspace.take<float>(rows), {sequence, head, 1}};
  out.norm = {workspace.take<float>(rows), {sequence, head, 1}};
  out.mean = {workspace.take<float>(rows * p.dim), {sequence * p.dim, head * p.dim, p.dim, 1}};
  return out;
}

HeadRows head_rows(const Tensor& t, bool vectors) {
  return {t.data, t.dtype, t.stride[0], t.stride[1], t.stride[2], t.stride[3], vectors};
}
HeadRows input_rows(const Tensor& t, DType kernel_type) {
  return head_rows(
      t, t.dtype == kernel_type && aligned(t, 16) && t.shape[3] * element_size(t.dtype) % 16 == 0);
}
HeadRows output_rows(const Tensor& t) { return head_rows(t, aligned(t, 8) && t.shape[3] % 4 == 0); }

// Types that differ meet in float32, which holds them all.
DType kernel_type_of(const LatentAttentionForward& p) {
  return p.q.dtype == p.k.dtype && p.k.dtype == p.v.dtype ? p.q.dtype : DType::float32;
}

Problem check(const LatentAttentionForward& p) {
  const Problem problem = validate(p, Memory::device);
  const std::string op = "[" + std::string(kOp) + "] ";
  if (problem.is_double)
    throw Error(Error::Kind::type,
                op + "q has dtype float64, expected float32, bfloat16 or float16 on CUDA");
  if (problem.latents > kMaxLatents || problem.dim > kMaxDim)
    throw Error(Error::Kind::value, op + "q, v have " + std::to_string(problem.latents) +
                                        " latents and " + std::to_string(problem.dim) +
                                        " channels, expected at most 256 of each on CUDA");
  return problem;
}

class ForwardPlan {
 public:
  explicit ForwardPlan(const LatentAttentionForward& p) : p_(p), problem_(check(p)) {
    const DType type = kernel_type_of(p);
    is_bfloat16_ = type == DType::bfloat16;
    args_.q = input_rows(p.q, type), args_.k = input_rows(p.k, type);
    args_.v = input_rows(p.v, type), args_.y = output_rows(p.y);
    if (present(p.key_mask)) {
      args_.key_mask = static_cast<const bool*>(p.key_mask.data);
      args_.mask_stride_b = p.key_mask.stride[0], args_.mask_stride_t = p.key_mask.stride[1];
    }
    args_.sequences = Sequences(p.cu_seqlens, problem_.sequences, problem_.tokens);
    args_.heads = static_cast<int>(problem_.heads);
    args_.kv_heads = static_cast<int>(problem_.kv_heads);
    args_.latents = static_cast<int>(problem_.latents);
    args_.dim = static_cast<int>(problem_.dim);
    args_.scale = static_cast<float>(p.scale);
    const int slice = value_slice(latent_tile(problem_.latents), is_bfloat16_);
    args_.slices = static_cast<int>(ceil_div(problem_.dim, slice));
    const int64_t key_blocks = problem_.sequences * problem_.kv_heads * args_.slices;
    const int64_t blocks = problem_.sequences * problem_.heads * args_.slices;
    parts_ = static_cast<int>(p.causal ? causal_segments(blocks, problem_.tokens)
                                       : token_parts(key_blocks, problem_.tokens));
    query_parts_ = static_cast<int>(p.causal ? parts_ : token_parts(blocks, problem_.tokens));
  }

  void place(Workspace& workspace) {
    if (summarised() > 0)
      summaries_ = take_states(workspace, problem_.sequences * parts_, problem_);
    if (p_.causal) return;
    total_ = present(p_.final.mean) ? view_of(p_.final)
                                    : take_states(workspace, problem_.sequences, problem_);
  }

  void run(void* stream) const {
    if (summarised() > 0) {
      AttentionArgs a = args_;
      a.parts = parts_, a.walked = summarised();
      a.final = summaries_, a.final_of_part = true;
      launch(AttentionKernel::key_summary, a, problem_.kv_heads, stream);
      fold(stream);
    }
    AttentionArgs a = args_;
    a.parts = a.walked = query_parts_;
    if (p_.causal) {
      a.initial_of_part = summarised() > 0;
      a.initial = a.initial_of_part ? summaries_ : view_of(p_.initial);
      a.final = view_of(p_.final);
      launch(AttentionKernel::causal_forward, a, problem_.heads, stream);
    } else {
      a.initial = total_;
      launch(AttentionKernel::bidirectional_forward, a, problem_.heads, stream);
    }
  }

 private:
  // The last part of a causal sequence comes before no other.
  int summarised() const { return p_.causal ? parts_ - 1 : parts_; }

  void launch(AttentionKernel kernel, const AttentionArgs& a, int64_t heads, void* stream) const {
    const int64_t blocks = problem_.sequences * heads * a.walked * a.slices;
    with_type(kernel_type_of(p_), [&](auto type) {
      using E = typename decltype(type)::type;
      if constexpr (!std::is_same_v<E, double>) launch_attention<E>(kernel, a, blocks, stream);
    });
  }

  void fold(void* stream) const {
    FoldArgs f;
    f.parts = summaries_, f.total = total_;
    if (p_.causal) f.initial = view_of(p_.initial);
    f.kv_heads = args_.kv_heads, f.latents = args_.latents, f.dim = args_.dim;
    f.count = summarised(), f.stride = parts_;
    f.writes_prefixes = p_.causal;
    launch_blocks(kOp, fold_parts, problem_.sequences * f.kv_heads * f.latents, kFoldThreads, 0,
                  stream, f);
  }

  const LatentAttentionForward p_;
  const Problem problem_;
  AttentionArgs args_;
  bool is_bfloat16_ = false;
  int parts_ = 1, query_parts_ = 1;
  StateView summaries_, total_;
};

}  // namespace

int64_t workspace_bytes(const LatentAttentionForward& params) {
  return workspace_of(ForwardPlan(params));
}

void latent_attention_forward(const LatentAttentionForward& params, void* workspace, void* stream) {
  run_plan(kOp, ForwardPlan(params), workspace, stream);
}

}  // namespace latte::cuda
