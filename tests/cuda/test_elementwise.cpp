// SPDX-License-Identifier: Apache-2.0
// Operators without tensor cores: what the CPU's own tests do not reach. Bytes moved, states cut
// between blocks, groups of many heads, borders that nobody has checked.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "arrays.h"
#include "backend.h"
#include "cuda/device.h"
#include "cuda/heuristics.h"
#include "latte/cuda.h"
#include "problem.h"
#include "workspace.h"

namespace testing_latte {
namespace {

Array filled(DType dtype, std::vector<int64_t> shape) {
  Array a(dtype, std::move(shape));
  for (int64_t i = 0; i < a.size(); ++i) a.set(i, static_cast<double>(i % 7) / 8);
  return a;
}

struct Bytes {
  int64_t loaded, stored;
};
template <class Params>
Bytes bytes_of(Function<Params> function, const Params& params) {
  latte::emulation::reset_counters();
  run(function, params, 1);
  const auto counters = latte::emulation::counters();
  return {static_cast<int64_t>(counters.load_bytes), static_cast<int64_t>(counters.store_bytes)};
}

// Uncut, and in four segments, of which the last needs no summary.
TEST(Bytes, LinearRecurrence) {
  constexpr int64_t kChannels = 64;
  for (const int64_t tokens : {128, 1024}) {
    const int64_t summarised = tokens - latte::cuda::scan_segment(kChannels, tokens);
    const int64_t number = 2 * kChannels;  // a token's row in bfloat16
    Array a = filled(DType::bfloat16, {1, tokens, kChannels}), b = a.like(), h = a.like();
    latte::LinearRecurrenceForward f;
    f.a = a.tensor(), f.b = b.tensor(), f.h = h.tensor();
    const Bytes forward = bytes_of(backend::linear_recurrence_forward, f);
    EXPECT_EQ(forward.loaded, (2 * tokens + 2 * summarised) * number);
    EXPECT_EQ(forward.stored, tokens * number);

    Array dh = a.like(), da = a.like(), db = a.like();
    latte::LinearRecurrenceBackward g;
    g.a = f.a, g.h = f.h, g.dh = dh.tensor(), g.da = da.tensor(), g.db = db.tensor();
    const Bytes backward = bytes_of(backend::linear_recurrence_backward, g);
    EXPECT_EQ(backward.loaded, (3 * tokens - 1 + 2 * summarised) * number);  // no h before token 0
    EXPECT_EQ(backward.stored, 2 * tokens * number);
  }
}

TEST(Bytes, RgLru) {
  constexpr int64_t kChannels = 64, kNumber = 2 * kChannels;
  for (const int64_t tokens : {128, 1024}) {
    const int64_t segment = latte::cuda::scan_segment(kChannels, tokens);
    const int64_t summarised = tokens - segment, segments = tokens / segment;
    // A thread per channel and segment reads log_lambda, in both launches.
    const int64_t parameters = (segments > 1 ? 2 * segments - 1 : 1) * kNumber;
    Array x = filled(DType::bfloat16, {1, tokens, kChannels}), gate_a = x.like();
    Array gate_x = x.like(), lambda = filled(DType::bfloat16, {kChannels}), y = x.like();
    latte::RgLruForward f;
    f.x = x.tensor(), f.gate_a = gate_a.tensor(), f.gate_x = gate_x.tensor();
    f.log_lambda = lambda.tensor(), f.y = y.tensor();
    const Bytes forward = bytes_of(backend::rg_lru_forward, f);
    EXPECT_EQ(forward.loaded, (3 * tokens + 3 * summarised) * kNumber + parameters);
    EXPECT_EQ(forward.stored, tokens * kNumber);

    Array dy = x.like(), dx = x.like(), d_gate_a = x.like(), d_gate_x = x.like();
    Array d_lambda = lambda.like();
    latte::RgLruBackward g;
    g.x = f.x, g.gate_a = f.gate_a, g.gate_x = f.gate_x, g.log_lambda = f.log_lambda, g.y = f.y;
    g.dy = dy.tensor(), g.dx = dx.tensor(), g.d_gate_a = d_gate_a.tensor();
    g.d_gate_x = d_gate_x.tensor(), g.d_log_lambda = d_lambda.tensor();
    const Bytes backward = bytes_of(backend::rg_lru_backward, g);
    EXPECT_EQ(backward.loaded, (5 * tokens - 1 + 2 * summarised) * kNumber + parameters + kNumber);
    EXPECT_EQ(backward.stored, 3 * tokens * kNumber + kNumber);
  }
}

TEST(Bytes, ShortConv) {
  constexpr int64_t kChannels = 64, kNumber = 2 * kChannels, kTokens = 256, kWidth = 4;
  const int64_t runs = kTokens / latte::cuda::conv_tokens(kTokens, kChannels);
  Array x = filled(DType::bfloat16, {1, kTokens, kChannels}), y = x.like();
  Array weight = filled(DType::bfloat16, {kChannels, kWidth}), d_weight = weight.like();
  latte::ShortConvForward f;
  f.x = x.tensor(), f.weight = weight.tensor(), f.y = y.tensor();
  const int64_t halo = (runs - 1) * (kWidth - 1), weights = runs * kWidth;
  const Bytes forward = bytes_of(backend::short_conv_forward, f);
  EXPECT_EQ(forward.loaded, (kTokens + halo + weights) * kNumber);
  EXPECT_EQ(forward.stored, kTokens * kNumber);

  Array dy = x.like(), dx = x.like();
  latte::ShortConvBackward g;
  g.x = f.x, g.weight = f.weight, g.dy = dy.tensor(), g.dx = dx.tensor();
  g.d_weight = d_weight.tensor();
  const Bytes backward = bytes_of(backend::short_conv_backward, g);
  EXPECT_EQ(backward.loaded, (2 * kTokens + 2 * halo + weights) * kNumber);
  EXPECT_EQ(backward.stored, (kTokens + kWidth) * kNumber);
}

TEST(Bytes, Rotate) {
  Array x = filled(DType::bfloat16, {2, 3, 20, 64}), y = x.like();
  Array position = filled(DType::int64, {20});
  latte::Rotate p;
  p.x = x.tensor(), p.y = y.tensor(), p.position = position.tensor(), p.dim = 48;
  const Bytes moved = bytes_of(backend::rotate, p);
  EXPECT_EQ(moved.loaded, 2 * x.size());
  EXPECT_EQ(moved.stored, 2 * x.size());
}

TEST(Bytes, StepAndMerge) {
  constexpr int64_t kLatents = 24, kDim = 40;
  Case c;
  c.tokens = 1, c.batch = 2, c.heads = c.kv_heads = 3, c.latents = kLatents, c.dim = kDim;
  c.initial = true;
  Call call(c);
  const int64_t heads = c.batch * c.heads;
  const Bytes step = bytes_of(backend::latent_attention_step, call.step_params());
  EXPECT_EQ(step.loaded, 4 * heads * (kLatents * kDim + 4 * kLatents + kDim));
  EXPECT_EQ(step.stored, 4 * heads * (kLatents * kDim + 2 * kLatents + kDim));

  latte::emulation::reset_counters();
  merge_states({call.initial.state(), call.initial.state(), call.final.state()});
  const auto merge = latte::emulation::counters();
  // Every lane of a warp asks for the latent's max and norm, one transaction for all.
  EXPECT_EQ(merge.load_bytes, 4 * heads * (2 * kLatents * kDim + 32 * 4 * kLatents));
  EXPECT_EQ(merge.store_bytes, 4 * heads * (kLatents * kDim + 2 * kLatents));
}

// Against the CPU: heads in groups of more than a visit's, and a state cut between blocks.
TEST(Step, GroupsAndSlices) {
  struct Size {
    int64_t heads, kv_heads, latents, dim;
  };
  for (const Size& size :
       {Size{7, 1, 10, 40}, Size{12, 2, 33, 12}, Size{2, 1, 256, 256}, Size{5, 1, 300, 130}})
    for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
      Case c;
      c.tokens = 1, c.batch = 2, c.heads = size.heads, c.kv_heads = size.kv_heads;
      c.latents = size.latents, c.dim = size.dim, c.initial = true, c.keys = Keys::infinite;
      c.set_type(dtype);
      SCOPED_TRACE(c.text());
      Call on_cpu(c), on_device(c);
      auto cpu = on_cpu.step_params();
      std::vector<unsigned char> workspace(latte::workspace_bytes(cpu, 1));
      latte::latent_attention_step(cpu, workspace.data(), 1);
      run(on_device.step_params(), 1);
      EXPECT_TRUE(on_device.y.intact() && on_device.initial.intact());
      const DType compute = c.compute_type();
      const double factor = 60 + 2 * unit_roundoff(c.v_type) / unit_roundoff(compute);
      expect_close("y", on_device.y.values(), on_cpu.y.values(), c.v_type, compute, factor);
      const StateArrays &got = on_device.initial, &want = on_cpu.initial;
      expect_close("max", got.max.values(), want.max.values(), compute, compute, 0);
      expect_close("norm", got.norm.values(), want.norm.values(), compute, compute, 60);
      expect_close("mean", got.mean.values(), want.mean.values(), compute, compute, 60);
    }
}

TEST(Step, TooManyLatents) {
  Case c;
  c.tokens = 1, c.latents = latte::cuda::kMaxStepLatents + 1, c.initial = true;
  Call call(c);
  try {
    latte::cuda::workspace_bytes(call.step_params());
    ADD_FAILURE() << "accepted";
  } catch (const latte::Error& error) {
    EXPECT_STREQ(
        error.what(),
        "[latent_attention_step] q has 513 latents, expected at most 512 on a CUDA device");
  }
}

// Garbage in cu_seqlens addresses nothing outside of the tensors. (Sequences that overlap would
// write the same tokens, in any order.)
TEST(Borders, Unchecked) {
  constexpr int64_t kTokens = 70, kChannels = 5;
  for (const std::vector<double>& values :
       {std::vector<double>{5, 60, 30, -2}, {-5, 40, 1e12, -1e12}, {90, 80, 75, 71}}) {
    Array borders(DType::int64, {4}), states = filled(DType::float32, {3, kChannels});
    for (int64_t i = 0; i < 4; ++i) borders.set(i, values[i]);
    Array a = filled(DType::float32, {1, kTokens, kChannels}), h = a.like(), da = a.like();
    Array final = states.like();
    latte::LinearRecurrenceForward f;
    f.a = f.b = a.tensor(), f.cu_seqlens = borders.tensor(), f.h = h.tensor();
    f.initial = states.tensor(), f.final = final.tensor();
    run(backend::linear_recurrence_forward, f, 1);
    EXPECT_TRUE(h.intact() && final.intact());

    Array weight = filled(DType::float32, {kChannels, 4}), d_weight = weight.like();
    Array tails = filled(DType::float32, {3, 3, kChannels}), d_tails = tails.like();
    latte::ShortConvBackward g;
    g.x = g.dy = a.tensor(), g.weight = weight.tensor(), g.cu_seqlens = borders.tensor();
    g.initial = g.d_final = tails.tensor(), g.dx = da.tensor(), g.d_weight = d_weight.tensor();
    g.d_initial = d_tails.tensor();
    run(backend::short_conv_backward, g, 1);
    EXPECT_TRUE(da.intact() && d_weight.intact() && d_tails.intact());
  }
}

}  // namespace
}  // namespace testing_latte
