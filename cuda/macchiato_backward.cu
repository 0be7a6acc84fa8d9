// SPDX-License-Identifier: Apache-2.0
// The gradient of Macchiato: what the gate gives to either part, row by row, then both on their
// own.
#include "cuda/macchiato.h"
#include "cuda/window_call.h"
#include "latte/cuda.h"

namespace latte::cuda {
namespace {

constexpr const char* kOp = "macchiato_attention_backward";

class BackwardPlan {
 public:
  explicit BackwardPlan(const MacchiatoBackward& p)
      : problem_(window_problem(kOp, p)), latent_(p.latent), window_(p.window, problem_) {
    latent_.q = behind_gate(p.q_latent), latent_.dq = behind_gate(p.dq_latent);
    latent_.cu_seqlens = p.window.cu_seqlens, latent_.causal = p.window.causal;
    RowGradientArgs& rows = window_.rows;
    rows.gate = gate_of(p.q_latent, problem_.latents, p.latent.scale);
    rows.y = head_rows(p.y);
    rows.d_log_sum = {};
    // Column 0 of (B,H,T,1+L).
    rows.d_gate = view_of(p.dq_latent);
    if (p.one_value && problem_.latents > 0) window_.args.more_dv = head_rows(p.latent.dv);
  }

  void place(Workspace& workspace) {
    window_.place(workspace);
    const WindowProblem& p = problem_;
    const int64_t rows = p.batch * p.heads * p.tokens;
    const auto column = [&] {
      return dense(workspace.take<float>(rows), DType::float32, {p.batch, p.heads, p.tokens});
    };
    window_.args.share = window_.rows.share = view_of(column());
    latent_.d_log_sum = column();
    window_.rows.d_latents = view_of(latent_.d_log_sum);
    if (p.latents == 0) return;
    latent_.dy = dense(workspace.take<float>(rows * p.dim), DType::float32,
                       {p.batch, p.heads, p.tokens, p.dim});
    window_.rows.d_global = head_rows(latent_.dy);
    memory_ = workspace.take<char>(workspace_bytes(latent_));
  }

  void run(void* stream) const {
    window_.check_device(kOp);
    window_.run_rows(stream);
    if (problem_.latents > 0) latent_attention_backward(latent_, memory_, stream);
    window_.run_window(stream);
  }

 private:
  const WindowProblem problem_;
  LatentAttentionBackward latent_;
  WindowBackwardPlan window_;
  void* memory_ = nullptr;
};

}  // namespace

int64_t workspace_bytes(const MacchiatoBackward& params) {
  return workspace_of(BackwardPlan(params));
}

void macchiato_backward(const MacchiatoBackward& params, void* workspace, void* stream) {
  run_plan(kOp, BackwardPlan(params), workspace, stream);
}

}  // namespace latte::cuda
