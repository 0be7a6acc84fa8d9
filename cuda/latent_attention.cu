// SPDX-License-Identifier: Apache-2.0
// One call becomes blocks, one per sequence, head and slice of D; a sequence so long that most of
// the device would be idle is cut into parts: their summaries, the states before each of them, and
// then the same kernel from those states.
#include "cuda/attention_call.h"
#include "latte/cuda.h"

namespace latte::cuda {
namespace {

constexpr const char* kOp = "latent_attention";

class ForwardPlan {
 public:
  explicit ForwardPlan(const LatentAttentionForward& p)
      : p_(p),
        problem_(validate(p, Memory::device)),
        type_(kernel_type_of({p.q.dtype, p.k.dtype, p.v.dtype})),
        args_(attention_args(p, problem_, type_)),
        states_(kOp, args_, type_, problem_, p.causal, key_parts()) {
    check_limits(kOp, problem_);
    args_.y = output_rows(p.y);
    args_.slices = static_cast<int>(slices());
    const int64_t blocks = problem_.sequences * problem_.heads * slices();
    args_.parts = args_.walked =
        p.causal ? key_parts() : static_cast<int>(token_parts(blocks, problem_.tokens));
  }

  void place(Workspace& workspace) { states_.place(workspace, p_.final); }

  void run(void* stream) const {
    const StateView initial = view_of(p_.initial);
    states_.run(initial, stream);
    AttentionArgs a = args_;
    if (p_.causal) {
      a.initial_of_part = states_.before().norm.data != nullptr;
      a.initial = a.initial_of_part ? states_.before() : initial;
      a.final = view_of(p_.final);
    } else {
      a.initial = states_.total();
    }
    const auto kernel =
        p_.causal ? AttentionKernel::causal_forward : AttentionKernel::bidirectional_forward;
    const int64_t blocks = problem_.sequences * problem_.heads * a.walked * a.slices;
    with_element_type(type_, [&](auto type) {
      launch_attention<typename decltype(type)::type>(kernel, a, blocks, stream);
    });
  }

 private:
  int64_t slices() const {
    return ceil_div(problem_.dim,
                    value_slice(latent_tile(problem_.latents), type_ == DType::bfloat16));
  }
  int key_parts() const {
    const int64_t heads = p_.causal ? problem_.heads : problem_.kv_heads;
    const int64_t blocks = problem_.sequences * heads * slices();
    return static_cast<int>(p_.causal ? causal_segments(blocks, problem_.tokens)
                                      : token_parts(blocks, problem_.tokens));
  }

  const LatentAttentionForward p_;
  const Problem problem_;
  const DType type_;
  AttentionArgs args_;
  KeyStates states_;
};

}  // namespace

int64_t workspace_bytes(const LatentAttentionForward& params) {
  return workspace_of(ForwardPlan(params));
}

void latent_attention_forward(const LatentAttentionForward& params, void* workspace, void* stream) {
  run_plan(kOp, ForwardPlan(params), workspace, stream);
}

}  // namespace latte::cuda
