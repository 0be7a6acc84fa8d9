// SPDX-License-Identifier: Apache-2.0
// Latte Macchiato: a window and latents in one probability, out of the kernels of both. The latents
// leave their rows in memory, which those of the window then mix into theirs.
#include "cuda/macchiato.h"
#include "cuda/window_call.h"
#include "cuda/window_step.h"
#include "latte/cuda.h"

namespace latte::cuda {
namespace {

constexpr const char* kForward = "macchiato_attention";
constexpr const char* kStep = "macchiato_attention_step";

class ForwardPlan {
 public:
  explicit ForwardPlan(const MacchiatoForward& p)
      : problem_(window_problem(kForward, p)), latent_(p.latent), window_(p.window, problem_) {
    latent_.q = behind_gate(p.q_latent);
    latent_.cu_seqlens = p.window.cu_seqlens, latent_.causal = p.window.causal;
    window_.args.gate = gate_of(p.q_latent, problem_.latents, p.latent.scale);
    window_.args.global = output_rows(p.latent.y);
    if (p.window.y.data == p.latent.y.data) window_.args.y = {};
  }
  void place(Workspace& workspace) {
    if (problem_.latents > 0) memory_ = workspace.take<char>(workspace_bytes(latent_));
  }
  void run(void* stream) const {
    if (problem_.latents > 0) latent_attention_forward(latent_, memory_, stream);
    window_.run(stream);
  }

 private:
  const WindowProblem problem_;
  LatentAttentionForward latent_;
  WindowForwardPlan window_;
  void* memory_ = nullptr;
};

class StepPlan {
 public:
  explicit StepPlan(const MacchiatoStep& p)
      : problem_(validate(p, Memory::device)),
        latent_(p.latent),
        window_(window_step_params(kStep, p.window, problem_)) {
    latent_.q = behind_gate(p.q_latent);
    window_.gate = gate_of(p.q_latent, problem_.latents, p.latent.scale);
  }
  // The latents' rows, in the compute type.
  void place(Workspace& workspace) {
    const WindowProblem& p = problem_;
    if (p.latents == 0) return;
    const DType dtype = p.is_double ? DType::float64 : DType::float32;
    char* const data = workspace.take<char>(p.batch * p.heads * p.dim * element_size(dtype));
    latent_.y = dense(data, dtype, {p.batch, p.heads, p.dim});
    window_.global = rows_of(latent_.y);
  }
  void run(void* stream) const {
    if (problem_.latents > 0) latent_attention_step(latent_, nullptr, stream);
    launch_window_step(kStep, window_, problem_.is_double, stream);
  }

 private:
  const WindowProblem problem_;
  LatentAttentionStep latent_;
  WindowStepParams window_;
};

}  // namespace

int64_t workspace_bytes(const MacchiatoForward& params) {
  return workspace_of(ForwardPlan(params));
}
int64_t workspace_bytes(const MacchiatoStep& params) { return workspace_of(StepPlan(params)); }

void macchiato_forward(const MacchiatoForward& params, void* workspace, void* stream) {
  run_plan(kForward, ForwardPlan(params), workspace, stream);
}
void macchiato_step(const MacchiatoStep& params, void* workspace, void* stream) {
  run_plan(kStep, StepPlan(params), workspace, stream);
}

}  // namespace latte::cuda
