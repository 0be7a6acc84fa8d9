// SPDX-License-Identifier: Apache-2.0
// The backward pass: states before the parts of every sequence, the walk of the queries, gradients
// behind the parts, the walk of the keys, and sums of what slices and heads left.
#include <cmath>

#include "cuda/attention_call.h"
#include "cuda/attention_rows.h"
#include "cuda/gradient_fold.cuh"
#include "cuda/gradient_launch.h"
#include "latte/cuda.h"

namespace latte::cuda {
namespace {

constexpr const char* kOp = "latent_attention_backward";

// Slices and parts, by shape, type and the device's shared memory.
struct GradientSizes {
  int latents;  // of a block
  int slices, latent_slices;
  int parts;  // of a sequence

  GradientSizes(const Problem& p, DType kernel_type, int64_t limit, bool causal) {
    latents = gradient_latents(p.latents, kernel_type, limit);
    slices = static_cast<int>(ceil_div(p.dim, kGradientChannels));
    latent_slices = static_cast<int>(ceil_div(p.latents, latents));
    const int64_t blocks = p.sequences * p.heads * slices * latent_slices;
    parts = static_cast<int>(causal ? causal_segments(blocks, p.tokens, tuning())
                                    : token_parts(blocks, p.tokens, tuning()));
  }
};

class BackwardPlan {
 public:
  BackwardPlan(const LatentAttentionBackward& p, int64_t limit)
      : p_(p),
        problem_(validate(p, Memory::device)),
        type_(kernel_type_of({p.q.dtype, p.k.dtype, p.v.dtype, p.dy.dtype})),
        sizes_(problem_, type_, limit, p.causal),
        states_(kOp, attention_args(p, problem_, type_), type_, problem_,
                ForwardSlices(problem_, type_, limit), p.causal, sizes_.parts) {
    check_limits(kOp, problem_);
    static_cast<AttentionArgs&>(args_) = attention_args(p, problem_, type_);
    args_.dy = input_rows(p.dy, type_);
    args_.slices = sizes_.slices, args_.latent_slices = sizes_.latent_slices;
    args_.d_log_sum = view_of(p.d_log_sum);
    args_.parts = args_.walked = sizes_.parts;
    // Causal blocks that sum dS as well leave p dp: their registers hold no whole rows.
    args_.whole = sizes_.slices * sizes_.latent_slices == 1 && !(p.causal && sums_queries());
    // With a scale near 0 dq says little of dp.
    recalls_ = p.causal && args_.whole && recalls_factors(type_) && p.dq.dtype == type_ &&
               std::abs(args_.scale) > 1e-12f;
  }

  void place(Workspace& workspace) {
    const Problem& p = problem_;
    states_.place(workspace, State());
    if (p_.causal && has_seed()) final_ = take_states(workspace, p.sequences, p);
    place_factors(workspace);
    place_gradients(workspace);
    place_partials(workspace);
  }

  void run(void* stream) const {
    const StateView initial = view_of(p_.initial);
    states_.run(initial, stream);
    GradientArgs a = args_;
    a.initial_of_part = p_.causal && states_.before().present();
    a.initial = !p_.causal ? states_.total() : a.initial_of_part ? states_.before() : initial;
    a.final = final_;
    walk_queries(a, stream);
    fold(stream);
    if (recalls_) a.dq = input_rows(p_.dq, type_);
    launch(!p_.causal ? GradientKernel::bidirectional_keys
           : recalls_ ? GradientKernel::recalling_keys
                      : GradientKernel::causal_keys,
           a, stream);
    finish(stream);
  }

 private:
  bool has_seed() const { return present(p_.d_final.mean); }
  bool sums_queries() const { return !p_.causal || sizes_.parts > 1; }
  int64_t rows() const { return problem_.batch * problem_.heads * problem_.tokens; }

  // (B,H,slices,T,padded) in the type of the products.
  HeadRows take_factors(Workspace& workspace, int64_t slices) const {
    const bool is_bfloat16 = type_ == DType::bfloat16;
    const int64_t plane = problem_.tokens * args_.padded, head = slices * plane;
    const int64_t elements = problem_.batch * problem_.heads * head;
    HeadRows out;
    out.data = is_bfloat16 ? static_cast<void*>(workspace.take<uint16_t>(elements))
                           : workspace.take<float>(elements);
    out.dtype = is_bfloat16 ? DType::bfloat16 : DType::float32;
    out.stride_b = problem_.heads * head, out.stride_h = head;
    out.stride_t = args_.padded, out.stride_c = 1;
    out.vectors = true, out.stride_partial = plane;
    return out;
  }
  void place_factors(Workspace& workspace) {
    const Problem& p = problem_;
    if (sizes_.latent_slices > 1)
      args_.softmax = take_softmax(workspace, p.batch, p.heads, p.tokens);
    if (!p_.causal) return;
    args_.border_chunks = ceil_div(p.tokens, kChunk);
    const int64_t chunks = p.batch * args_.border_chunks + p.sequences * sizes_.parts;
    args_.borders = workspace.take<float>(chunks * p.heads * p.latents);
    if (recalls_) {
      args_.norms = workspace.take<float>(chunks * p.heads * p.latents);
      args_.along = {workspace.take<float>(rows()), {p.heads * p.tokens, p.tokens, 1}};
      return;
    }
    args_.padded = static_cast<int>(round_up(p.latents, 8));
    args_.r = take_factors(workspace, 1);
    args_.product = take_factors(workspace, sizes_.slices);
  }

  GradientView take_gradients(Workspace& workspace, int64_t count) const {
    const Problem& p = problem_;
    const int64_t head = p.latents * p.dim, norms = sizes_.slices * p.latents;
    GradientView out;
    out.sum = {workspace.take<float>(count * p.heads * head), {p.heads * head, head, p.dim, 1}};
    out.norm = {workspace.take<float>(count * p.heads * norms),
                {p.heads * norms, norms, p.latents, 1}};
    return out;
  }
  void place_gradients(Workspace& workspace) {
    const int64_t n = problem_.sequences;
    if (sums_queries() || has_seed()) args_.part = take_gradients(workspace, n * sizes_.parts);
    args_.behind = p_.causal ? args_.part : take_gradients(workspace, n);
    args_.behind_part = p_.causal;
    if (present(p_.d_initial.mean)) args_.front = take_gradients(workspace, n);
  }

  void place_partials(Workspace& workspace) {
    const Problem& p = problem_;
    const int64_t group = p.heads / p.kv_heads, keys = p.batch * p.kv_heads * p.tokens;
    dk_.place(workspace, group * sizes_.slices, keys * p.latents);
    dv_.place(workspace, group * sizes_.latent_slices, keys * p.dim);
    args_.dk = dk_.count == 1 ? output_rows(p_.dk) : dense(dk_.data, p.latents, sizes_.slices);
    args_.dv = dv_.count == 1 ? output_rows(p_.dv) : dense(dv_.data, p.dim, sizes_.latent_slices);
    args_.dq = output_rows(p_.dq);
    if (args_.whole) return;
    // Of one slice of D and several of L there is one sum, which is not dq yet.
    products_ = workspace.take<float>(rows() * p.latents * sizes_.slices);
    args_.dq = dense(products_, p.latents, sizes_.slices);
  }
  HeadRows dense(float* data, int64_t channels, int64_t count) const {
    return partial_rows(data, problem_.heads, problem_.tokens, channels, count);
  }

  void launch(GradientKernel kernel, const GradientArgs& a, void* stream) const {
    const int64_t blocks =
        problem_.sequences * problem_.heads * a.walked * a.slices * a.latent_slices;
    with_element_type(type_, [&](auto type) {
      launch_gradient<typename decltype(type)::type>(kernel, a, sizes_.latents, blocks, stream);
    });
  }
  RowArgs row_args() const {
    RowArgs a;
    a.q = args_.q, a.dq = head_rows(p_.dq, false);
    a.partial = products_, a.count = sizes_.slices;
    a.softmax = args_.softmax, a.d_log_sum = args_.d_log_sum;
    a.heads = problem_.heads, a.tokens = problem_.tokens, a.rows = rows();
    a.latents = args_.latents, a.scale = args_.scale;
    return a;
  }

  void walk_queries(const GradientArgs& a, void* stream) const {
    if (a.softmax.data) launch_query_softmax(kOp, row_args(), stream);
    launch(!p_.causal       ? GradientKernel::bidirectional_queries
           : sums_queries() ? GradientKernel::causal_query_sums
                            : GradientKernel::causal_queries,
           a, stream);
  }

  void fold(void* stream) const {
    if (!args_.behind.present()) return;
    GradientFoldArgs f;
    if (p_.causal) f.before = states_.before();
    f.causal = p_.causal;
    f.final = p_.causal ? final_ : states_.total();
    f.d_norm = view_of(p_.d_final.norm), f.d_mean = view_of(p_.d_final.mean);
    f.parts = args_.part, f.total = args_.behind;
    f.heads = args_.heads, f.kv_heads = args_.kv_heads;
    f.latents = args_.latents, f.dim = args_.dim, f.slices = sizes_.slices;
    f.count = sizes_.parts;
    launch_blocks(kOp, fold_gradients, problem_.sequences * problem_.heads * problem_.latents,
                  kGradientThreads, kFoldShared, stream, f);
  }

  void finish(void* stream) const {
    if (!args_.whole) launch_finish_queries(kOp, row_args(), stream);
    dk_.sum(kOp, p_.dk, stream);
    dv_.sum(kOp, p_.dv, stream);
    if (!args_.front.present()) return;
    InitialGradientArgs a;
    a.front = args_.front, a.initial = view_of(p_.initial);
    a.d_norm = view_of(p_.d_initial.norm), a.d_mean = view_of(p_.d_initial.mean);
    a.heads = args_.heads, a.kv_heads = args_.kv_heads;
    a.latents = args_.latents, a.dim = args_.dim, a.slices = sizes_.slices;
    const int64_t count = problem_.sequences * problem_.kv_heads * problem_.latents;
    launch_blocks(kOp, initial_gradient, ceil_div(count, kGradientThreads / 32), kGradientThreads,
                  0, stream, a, count);
  }

  const LatentAttentionBackward p_;
  const Problem problem_;
  const DType type_;
  const GradientSizes sizes_;
  GradientArgs args_;
  bool recalls_ = false;
  KeyStates states_;
  StateView final_;
  Partials dk_, dv_;
  float* products_ = nullptr;
};

}  // namespace

int64_t workspace_bytes(const LatentAttentionBackward& params) {
  return workspace_of_any<BackwardPlan>(params);
}

void latent_attention_backward(const LatentAttentionBackward& params, void* workspace,
                               void* stream) {
  run_plan(kOp, BackwardPlan(params, device_limits().shared_bytes), workspace, stream);
}

}  // namespace latte::cuda
