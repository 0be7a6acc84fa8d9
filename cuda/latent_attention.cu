// SPDX-License-Identifier: Apache-2.0
// One call becomes blocks, one per sequence, head and slice of D and L; a sequence so long that
// most of the device would be idle is cut into parts: their summaries, the states before each of
// them, and then the same kernel from those states.
#include "cuda/attention_call.h"
#include "cuda/attention_rows.h"
#include "latte/cuda.h"

namespace latte::cuda {
namespace {

constexpr const char* kOp = "latent_attention";

class ForwardPlan {
 public:
  ForwardPlan(const LatentAttentionForward& p, int64_t limit)
      : p_(p),
        problem_(validate(p, Memory::device)),
        type_(kernel_type_of({p.q.dtype, p.k.dtype, p.v.dtype})),
        cut_(problem_, type_, limit),
        args_(attention_args(p, problem_, type_)),
        states_(kOp, args_, type_, problem_, cut_, p.causal, key_parts()) {
    check_limits(kOp, problem_);
    args_.slices = cut_.slices, args_.latent_slices = cut_.latent_slices;
    const int64_t blocks = problem_.sequences * problem_.heads * cut_.blocks();
    args_.parts = args_.walked =
        p.causal ? key_parts() : static_cast<int>(token_parts(blocks, problem_.tokens, tuning()));
  }

  void place(Workspace& workspace) {
    const Problem& p = problem_;
    states_.place(workspace, p_.final);
    y_.place(workspace, cut_.latent_slices, p.batch * p.heads * p.tokens * p.dim);
    args_.y = y_.count == 1 ? output_rows(p_.y)
                            : partial_rows(y_.data, p.heads, p.tokens, p.dim, y_.count);
    if (y_.count > 1) args_.softmax = take_softmax(workspace, p.batch, p.heads, p.tokens);
  }

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
    if (a.softmax.data) find_softmax(stream);
    const auto kernel =
        p_.causal ? AttentionKernel::causal_forward : AttentionKernel::bidirectional_forward;
    const int64_t blocks = problem_.sequences * problem_.heads * a.walked * cut_.blocks();
    with_element_type(type_, [&](auto type) {
      launch_attention<typename decltype(type)::type>(kernel, a, cut_.latents, blocks, stream);
    });
    y_.sum(kOp, p_.y, stream);
  }

 private:
  int key_parts() const {
    const int64_t heads = p_.causal ? problem_.heads : problem_.kv_heads;
    const int64_t blocks = problem_.sequences * heads * cut_.blocks();
    return static_cast<int>(p_.causal ? causal_segments(blocks, problem_.tokens, tuning())
                                      : token_parts(blocks, problem_.tokens, tuning()));
  }
  void find_softmax(void* stream) const {
    RowArgs rows;
    rows.q = args_.q, rows.softmax = args_.softmax;
    rows.heads = problem_.heads, rows.tokens = problem_.tokens;
    rows.rows = problem_.batch * problem_.heads * problem_.tokens;
    rows.latents = args_.latents, rows.scale = args_.scale;
    launch_query_softmax(kOp, rows, stream);
  }

  const LatentAttentionForward p_;
  const Problem problem_;
  const DType type_;
  const ForwardSlices cut_;
  AttentionArgs args_;
  KeyStates states_;
  Partials y_;
};

}  // namespace

int64_t workspace_bytes(const LatentAttentionForward& params) {
  return workspace_of_any<ForwardPlan>(params);
}

void latent_attention_forward(const LatentAttentionForward& params, void* workspace, void* stream) {
  run_plan(kOp, ForwardPlan(params, device_limits().shared_bytes), workspace, stream);
}

}  // namespace latte::cuda
