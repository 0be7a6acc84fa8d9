// SPDX-License-Identifier: Apache-2.0
// The gradient of Macchiato on CUDA against the CPU.
#include <gtest/gtest.h>

#include "macchiato_call.h"
#include "workspace.h"

namespace testing_latte {
namespace {

// The arrays of a backward call, after the forward call that it takes y and
// log_sum of.
class Gradient {
 public:
  explicit Gradient(const MacchiatoCase& shape) : call(shape) {
    run_on_cpu(latte::macchiato_forward, call.forward_params());
    const MacchiatoCase& c = call.c;
    dy = call.y.like();
    call.fill(dy);
    dq_latent = call.q_latent.like(), dk_latent = call.k_latent.like();
    dv_latent =
        Array(c.one_value ? c.compute() : c.type, {c.batch, c.latent_heads, c.tokens, c.dim});
    dq = call.q.like(), dk = call.k.like(), dv = call.v.like();
    if (c.sinks > 0)
      dq_sink = call.q_sink.like(), dk_sink = call.k_sink.like(), dv_sink = call.v_sink.like();
    if (!c.state) return;
    const auto make = [&] {
      return StateArrays(c.compute(), c.sequences(), c.latent_heads, c.latents, c.dim,
                         Layout::contiguous, false);
    };
    d_final = make(), d_initial = make();
    call.fill(d_final.norm), call.fill(d_final.mean);
  }

  latte::MacchiatoBackward params() const {
    latte::MacchiatoBackward p;
    p.q_latent = call.q_latent.tensor(), p.y = call.total.tensor();
    p.latent.k = call.k_latent.tensor();
    p.latent.v = call.c.one_value ? call.v.tensor() : call.v_latent.tensor();
    p.latent.key_mask = call.mask.tensor(), p.latent.scale = 0.7;
    p.latent.initial = call.initial.state();
    p.latent.d_final = d_final.state(), p.latent.d_initial = d_initial.state();
    p.latent.dk = dk_latent.tensor(), p.latent.dv = dv_latent.tensor();
    call.set_window(p.window);
    p.window.log_sum = call.log_sum.tensor(), p.window.wide = call.wide.tensor();
    p.window.dy = dy.tensor();
    p.window.dq = dq.tensor(), p.window.dk = dk.tensor(), p.window.dv = dv.tensor();
    p.window.dq_sink = dq_sink.tensor(), p.window.dk_sink = dk_sink.tensor();
    p.window.dv_sink = dv_sink.tensor();
    p.dq_latent = dq_latent.tensor(), p.one_value = call.c.one_value;
    return p;
  }

  MacchiatoCall call;
  Array dy, dq_latent, dk_latent, dv_latent, dq, dk, dv, dq_sink, dk_sink, dv_sink;
  StateArrays d_final, d_initial;
};

TEST(MacchiatoBackward, EveryCase) {
  std::vector<MacchiatoCase> cases = macchiato_cases();
  MacchiatoCase shared;
  shared.one_value = true;
  cases.push_back(shared);
  shared.type = DType::bfloat16;
  cases.push_back(shared);
  for (const MacchiatoCase& c : cases) {
    SCOPED_TRACE(c.text());
    Gradient on_cpu(c), on_device(c);
    run_on_cpu(latte::macchiato_backward, on_cpu.params());
    run(latte::cuda::macchiato_backward, on_device.params(), 1);
    const auto close = [&](const char* name, const Array& got, const Array& expected) {
      EXPECT_TRUE(got.intact()) << name;
      on_device.call.close(name, got, expected, 400);
    };
    close("dq_latent", on_device.dq_latent, on_cpu.dq_latent);
    close("dk_latent", on_device.dk_latent, on_cpu.dk_latent);
    if (!c.one_value && c.latents > 0) close("dv_latent", on_device.dv_latent, on_cpu.dv_latent);
    close("dq", on_device.dq, on_cpu.dq);
    close("dk", on_device.dk, on_cpu.dk);
    close("dv", on_device.dv, on_cpu.dv);
    if (c.sinks > 0) {
      close("dq_sink", on_device.dq_sink, on_cpu.dq_sink);
      close("dk_sink", on_device.dk_sink, on_cpu.dk_sink);
      close("dv_sink", on_device.dv_sink, on_cpu.dv_sink);
    }
    if (!c.state) continue;
    close("d_norm", on_device.d_initial.norm, on_cpu.d_initial.norm);
    close("d_mean", on_device.d_initial.mean, on_cpu.d_initial.mean);
  }
}

}  // namespace
}  // namespace testing_latte
