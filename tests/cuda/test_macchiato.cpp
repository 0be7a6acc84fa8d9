// SPDX-License-Identifier: Apache-2.0
// Macchiato and the steps of windows on CUDA against the CPU.
#include <gtest/gtest.h>

#include "macchiato_call.h"
#include "workspace.h"

namespace testing_latte {
namespace {

TEST(Macchiato, Forward) {
  for (const MacchiatoCase& c : macchiato_cases()) {
    SCOPED_TRACE(c.text());
    MacchiatoCall on_cpu(c), on_device(c);
    run_on_cpu(latte::macchiato_forward, on_cpu.forward_params());
    run(latte::cuda::macchiato_forward, on_device.forward_params(), 1);
    for (const Array* a : {&on_device.y, &on_device.total, &on_device.wide, &on_device.log_sum})
      EXPECT_TRUE(a->intact());
    on_device.close("total", on_device.total, on_cpu.total, 60);
    on_device.close("wide", on_device.wide, on_cpu.wide, 60);
    on_device.close("log_sum", on_device.log_sum, on_cpu.log_sum, 60);
    if (c.type != c.compute()) on_device.close("y", on_device.y, on_cpu.y, 60);
    if (c.state) on_device.close("mean", on_device.final.mean, on_cpu.final.mean, 60);
  }
}

// A row of the gate that is -inf throughout gives zeros; column 0 of -inf leaves the latents alone.
TEST(Macchiato, InfiniteGates) {
  MacchiatoCase c;
  MacchiatoCall on_cpu(c), on_device(c);
  for (MacchiatoCall* call : {&on_cpu, &on_device}) {
    for (int64_t i = 0; i <= c.latents; ++i) call->q_latent.set(i, -kInfinity);
    call->q_latent.set(1 + c.latents, -kInfinity);
  }
  run_on_cpu(latte::macchiato_forward, on_cpu.forward_params());
  run(latte::cuda::macchiato_forward, on_device.forward_params(), 1);
  for (int64_t d = 0; d < c.dim; ++d) EXPECT_EQ(on_device.total.get(d), 0);
  on_device.close("total", on_device.total, on_cpu.total, 60);
}

// A ring of a sequence and its steps, on the CPU or on CUDA.
class Steps {
 public:
  Steps(const MacchiatoCase& shape, int64_t group)
      : c(shape),
        key(c.type, {c.batch, c.kv_heads, c.window, c.key_dim}),
        value(c.compute(), {c.batch, c.kv_heads, c.window, c.dim}),
        valid(DType::boolean, {c.batch, c.window}),
        position(DType::int64, {c.batch}),
        sink_position(DType::int64, {c.batch, c.sinks}),
        state(c.compute(), c.batch, c.kv_heads, c.latents, c.dim),
        y(c.type, {c.batch, group * c.kv_heads, c.dim}),
        q_latent(c.compute(), {c.batch, group * c.kv_heads, 1 + c.latents}),
        k_latent(c.type, {c.batch, c.kv_heads, c.latents}),
        v_latent(c.type, {c.batch, c.kv_heads, c.dim}),
        q(c.type, {c.batch, group * c.kv_heads, c.key_dim}),
        k(c.type, {c.batch, c.kv_heads, c.key_dim}),
        v(c.type, {c.batch, c.kv_heads, c.dim}),
        q_sink(c.type, {c.batch, group * c.kv_heads, c.key_dim}),
        k_sink(c.type, {c.batch, c.kv_heads, c.sinks, c.key_dim}),
        v_sink(c.type, {c.batch, c.kv_heads, c.sinks, c.dim}) {
    for (Array* a : {&k_sink, &v_sink}) fill(*a);
    // Two of the ring's slots are full already, and one that is not is among those in use.
    for (Array* a : {&key, &value}) fill(*a);
    for (int64_t i = 0; i < valid.size(); ++i) valid.set(i, i % c.window < 2);
    for (int64_t i = 0; i < position.size(); ++i) position.set(i, 3);
    for (int64_t i = 0; i < sink_position.size(); ++i) sink_position.set(i, i % 7 - 3);
    for (Array* a : {&state.norm, &state.mean})
      for (int64_t i = 0; i < a->size(); ++i) a->set(i, 0);
    for (int64_t i = 0; i < state.max.size(); ++i) state.max.set(i, -kInfinity);
  }

  latte::MacchiatoStep next() {
    for (Array* a : {&q_latent, &k_latent, &v_latent, &q, &k, &v, &q_sink}) fill(*a);
    latte::MacchiatoStep p;
    p.q_latent = q_latent.tensor();
    p.latent.k = k_latent.tensor(), p.latent.v = v_latent.tensor();
    p.latent.state = state.state(), p.latent.scale = 0.7;
    latte::SlidingWindowStep& w = p.window;
    w.q = q.tensor(), w.k = k.tensor(), w.v = v.tensor(), w.y = y.tensor();
    w.ring = {key.tensor(), value.tensor(), valid.tensor(), position.tensor()};
    w.q_sink = q_sink.tensor(), w.k_sink = k_sink.tensor(), w.v_sink = v_sink.tensor();
    w.sink_position = sink_position.tensor();
    w.scale = 0.4, w.softcap = 5;
    return p;
  }
  bool intact() const {
    return y.intact() && key.intact() && value.intact() && valid.intact() && position.intact();
  }
  void fill(Array& a) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < a.size(); ++i) a.set(i, normal(random_));
  }

  const MacchiatoCase c;
  Array key, value, valid, position, sink_position;
  StateArrays state;
  Array y, q_latent, k_latent, v_latent, q, k, v, q_sink, k_sink, v_sink;

 private:
  std::mt19937 random_{1};
};

// Groups of more heads than a visit's, rings that wrap around, sinks that come into sight.
template <class Cpu, class Device>
void compare_steps(Cpu on_cpu, Device on_device) {
  for (const DType type : {DType::float32, DType::float64, DType::bfloat16, DType::float16})
    for (const int64_t dim : {10, 70}) {
      MacchiatoCase c;
      c.type = type, c.window = 9, c.sinks = 2, c.dim = dim, c.key_dim = dim + 3;
      Steps cpu(c, 6), device(c, 6);
      for (int t = 0; t < 16; ++t) {
        SCOPED_TRACE(c.text() + " token " + std::to_string(t));
        on_cpu(cpu.next());
        on_device(device.next());
        const DType compute = c.compute();
        expect_close("y", device.y.values(), cpu.y.values(), type, compute,
                     60 + (type == compute ? 0 : 2 * unit_roundoff(type) / unit_roundoff(compute)));
      }
      EXPECT_TRUE(device.intact());
      EXPECT_EQ(device.key.bytes(), cpu.key.bytes());
      EXPECT_EQ(device.value.bytes(), cpu.value.bytes());
      EXPECT_EQ(device.valid.bytes(), cpu.valid.bytes());
      EXPECT_EQ(device.position.bytes(), cpu.position.bytes());
    }
}

TEST(Steps, Window) {
  compare_steps(
      [](const latte::MacchiatoStep& p) { run_on_cpu(latte::sliding_window_step, p.window); },
      [](const latte::MacchiatoStep& p) { run(latte::cuda::sliding_window_step, p.window, 1); });
}
TEST(Steps, Macchiato) {
  compare_steps([](const latte::MacchiatoStep& p) { run_on_cpu(latte::macchiato_step, p); },
                [](const latte::MacchiatoStep& p) { run(latte::cuda::macchiato_step, p, 1); });
}

// Positions on the device are not checked.
TEST(Steps, WrongPositionsStayInside) {
  MacchiatoCase c;
  c.window = 9, c.sinks = 2;
  Steps steps(c, 2);
  for (const double position : {-1.0, -12345.0, 1e15}) {
    for (int64_t i = 0; i < steps.position.size(); ++i) steps.position.set(i, position);
    run(latte::cuda::sliding_window_step, steps.next().window, 1);
    EXPECT_TRUE(steps.intact());
  }
}

}  // namespace
}  // namespace testing_latte
