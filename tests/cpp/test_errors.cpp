// SPDX-License-Identifier: Apache-2.0
// Every rejected argument: kind of the error, operation, argument, what came and what was expected.
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "problem.h"

namespace testing_latte {
namespace {

using Kind = latte::Error::Kind;

void expect_error(Kind kind, const std::vector<std::string>& parts,
                  const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "no error, expected one with '" << parts.back() << "'";
  } catch (const latte::Error& error) {
    EXPECT_EQ(error.kind, kind) << error.what();
    for (const std::string& part : parts)
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
          << "'" << error.what() << "' lacks '" << part << "'";
    EXPECT_EQ(std::string(error.what()).find(parts[0]), 0u);
  }
}

template <class Params>
void expect_rejected(Params params, Kind kind, std::vector<std::string> parts) {
  const char* op = std::is_same_v<Params, latte::LatentAttentionForward> ? "[latent_attention] "
                   : std::is_same_v<Params, latte::LatentAttentionBackward>
                       ? "[latent_attention_backward] "
                       : "[latent_attention_step] ";
  parts.insert(parts.begin(), op);
  std::vector<unsigned char> memory(1 << 20);
  expect_error(kind, parts, [&] { latte::workspace_bytes(params, 1); });
  expect_error(kind, parts, [&] {
    if constexpr (std::is_same_v<Params, latte::LatentAttentionForward>) {
      latte::latent_attention_forward(params, memory.data(), 1);
    } else if constexpr (std::is_same_v<Params, latte::LatentAttentionBackward>) {
      latte::latent_attention_backward(params, memory.data(), 1);
    } else {
      latte::latent_attention_step(params, memory.data(), 1);
    }
  });
}

Case full_case() {
  Case c;
  c.batch = 2, c.heads = 4, c.kv_heads = 2, c.initial = true, c.masked = true;
  return c;
}

class ForwardErrors : public testing::Test {
 protected:
  Call call_{full_case()};
  latte::LatentAttentionForward p_ = call_.forward_params();
  void rejected(Kind kind, std::vector<std::string> parts) { expect_rejected(p_, kind, parts); }
};

TEST_F(ForwardErrors, QRank) {
  p_.q.rank = 3;
  rejected(Kind::value, {"q has shape (2, 4, 17)", "expected 4 dimensions"});
}
TEST_F(ForwardErrors, KShape) {
  p_.k.shape[3] = 6;
  rejected(Kind::value, {"k has shape (2, 2, 17, 6)", "expected (2, 2, 17, 5)"});
}
TEST_F(ForwardErrors, VShape) {
  p_.v.shape[2] = 16;
  rejected(Kind::value, {"v has shape (2, 2, 16, 6)", "expected (2, 2, 17, 6)"});
}
TEST_F(ForwardErrors, YShape) {
  p_.y.shape[1] = 2;
  rejected(Kind::value, {"y has shape (2, 2, 17, 6)", "expected (2, 4, 17, 6)"});
}
TEST_F(ForwardErrors, MaskShape) {
  p_.key_mask.shape[1] = 16;
  rejected(Kind::value, {"key_mask has shape (2, 16)", "expected (2, 17)"});
}
TEST_F(ForwardErrors, StateShape) {
  p_.initial.norm.shape[2] = 4;
  rejected(Kind::value, {"state.norm has shape (2, 2, 4)", "expected (2, 2, 5)"});
}
TEST_F(ForwardErrors, StateMissingField) {
  p_.initial.max = {};
  rejected(Kind::value, {"state.max has shape ()", "expected (2, 2, 5)"});
}
TEST_F(ForwardErrors, FinalShape) {
  p_.final.mean.shape[3] = 7;
  rejected(Kind::value, {"final.mean has shape (2, 2, 5, 7)", "expected (2, 2, 5, 6)"});
}
TEST_F(ForwardErrors, HeadsNotAMultiple) {
  p_.k.shape[1] = p_.v.shape[1] = 3;
  rejected(Kind::value, {"q has 4 heads", "expected a multiple of the 3 heads of k"});
}
TEST_F(ForwardErrors, NoLatents) {
  p_.q.shape[3] = p_.k.shape[3] = 0;
  rejected(Kind::value, {"0 latents", "expected at least 1"});
}
TEST_F(ForwardErrors, IntegerQuery) {
  p_.q.dtype = DType::int32;
  rejected(Kind::type, {"q has dtype int32", "expected float32 or bfloat16 or float16"});
}
TEST_F(ForwardErrors, MixedDouble) {
  p_.k.dtype = DType::float64;
  rejected(Kind::type, {"float32, float64, float32", "expected float64 for all three or for none"});
}
TEST_F(ForwardErrors, YType) {
  p_.y.dtype = DType::bfloat16;
  rejected(Kind::type, {"y has dtype bfloat16", "expected float32"});
}
TEST_F(ForwardErrors, MaskType) {
  p_.key_mask.dtype = DType::int32;
  rejected(Kind::type, {"key_mask has dtype int32", "expected bool"});
}
TEST_F(ForwardErrors, StateType) {
  p_.initial.mean.dtype = DType::float16;
  rejected(Kind::type, {"state.mean has dtype float16", "expected float32"});
}
TEST_F(ForwardErrors, StateWithoutCausal) {
  p_.causal = false;
  rejected(Kind::value, {"initial state", "expected causal=True"});
}
TEST_F(ForwardErrors, NoData) {
  p_.v.data = nullptr;
  rejected(Kind::value, {"v has no data"});
}
TEST_F(ForwardErrors, Sizes) {
  for (const int64_t tokens : {int64_t{-1}, int64_t{1} << 62}) {
    for (latte::Tensor* t : {&p_.q, &p_.k, &p_.v, &p_.y}) t->shape[2] = tokens;
    p_.key_mask = {};
    rejected(Kind::value, {"q has shape (2, 4, " + std::to_string(tokens) + ", 5)",
                           "expected sizes from 0, at most 2^48 elements"});
  }
}
TEST_F(ForwardErrors, ExpandedOutput) {
  p_.y.stride[2] = 0;
  rejected(Kind::value, {"y has stride 0 in dimension 2"});
}
TEST_F(ForwardErrors, ExpandedFinalMax) {
  p_.final.max.stride[1] = 0;
  rejected(Kind::value, {"final.max has stride 0 in dimension 1"});
}
TEST_F(ForwardErrors, Scale) {
  for (const double scale :
       {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    p_.scale = scale;
    rejected(Kind::value, {"scale is ", "expected a finite number"});
  }
}
TEST_F(ForwardErrors, Threads) {
  for (const int threads : {0, -1}) {
    const std::vector<std::string> parts = {"[latent_attention] ",
                                            "threads is " + std::to_string(threads)};
    std::vector<unsigned char> memory(1 << 20);
    expect_error(Kind::value, parts, [&] { latte::workspace_bytes(p_, threads); });
    expect_error(Kind::value, parts,
                 [&] { latte::latent_attention_forward(p_, memory.data(), threads); });
  }
}
TEST_F(ForwardErrors, NullWorkspace) {
  expect_error(Kind::value, {"[latent_attention] ", "workspace is null"},
               [&] { latte::latent_attention_forward(p_, nullptr, 1); });
}
TEST_F(ForwardErrors, WritesNothing) {
  p_.scale = std::nan("");
  rejected(Kind::value, {"scale"});
  for (const double y : call_.y.values()) EXPECT_TRUE(std::isnan(y));
}

TEST(PackedErrors, Borders) {
  struct Bad {
    std::vector<int64_t> borders;
    const char* message;
  };
  for (const DType dtype : {DType::int32, DType::int64})
    for (const Bad& bad : {Bad{{1, 17}, "cu_seqlens[0] is 1, expected 0"},
                           Bad{{0, 9, 8, 17}, "cu_seqlens[2] is 8, expected at least 9"},
                           Bad{{0, 9, 16}, "cu_seqlens ends at 16, expected 17"},
                           Bad{{0, -1, 17}, "cu_seqlens[1] is -1, expected at least 0"}}) {
      Case c;
      c.borders = {0, 9, 17};
      Call call(c);
      auto params = call.forward_params();
      Array borders(dtype, {static_cast<int64_t>(bad.borders.size())});
      for (int64_t i = 0; i < borders.size(); ++i)
        borders.set(i, static_cast<double>(bad.borders[i]));
      params.cu_seqlens = borders.tensor();
      params.final = {};
      expect_rejected(params, Kind::value, {bad.message});
    }
}

TEST(PackedErrors, BatchRankAndType) {
  Case c;
  c.batch = 2;
  Call call(c);
  auto params = call.forward_params();
  Array borders(DType::int64, {2}), square(DType::int64, {1, 2}), floats(DType::float32, {2});
  borders.set(0, 0), borders.set(1, 17);
  params.cu_seqlens = borders.tensor();
  expect_rejected(params, Kind::value, {"q has batch 2", "expected 1 with cu_seqlens"});
  params.cu_seqlens = square.tensor();
  expect_rejected(params, Kind::value, {"cu_seqlens has shape (1, 2)", "expected 1 dimension"});
  params.cu_seqlens = floats.tensor();
  expect_rejected(params, Kind::type, {"cu_seqlens has dtype float32", "expected int32 or int64"});
}

class BackwardErrors : public testing::Test {
 protected:
  Call call_{full_case()};
  latte::LatentAttentionBackward p_ = call_.backward_params();
  void rejected(Kind kind, std::vector<std::string> parts) { expect_rejected(p_, kind, parts); }
};

TEST_F(BackwardErrors, Shapes) {
  p_.dy.shape[3] = 5;
  rejected(Kind::value, {"dy has shape (2, 4, 17, 5)", "expected (2, 4, 17, 6)"});
  p_ = call_.backward_params();
  p_.dk.shape[1] = 4;
  rejected(Kind::value, {"dk has shape (2, 4, 17, 5)", "expected (2, 2, 17, 5)"});
  p_ = call_.backward_params();
  p_.d_final.mean.shape[0] = 1;
  rejected(Kind::value, {"d_final.mean has shape (1, 2, 5, 6)", "expected (2, 2, 5, 6)"});
  p_ = call_.backward_params();
  p_.d_initial.norm = {};
  rejected(Kind::value, {"d_initial.norm has shape ()", "expected (2, 2, 5)"});
}
TEST_F(BackwardErrors, Types) {
  p_.dv.dtype = DType::float16;
  rejected(Kind::type, {"dv has dtype float16", "expected float32"});
}
TEST_F(BackwardErrors, LogSum) {
  Array d(DType::float32, {2, 4, 16});
  p_.d_log_sum = d.tensor();
  rejected(Kind::value, {"d_log_sum has shape (2, 4, 16)", "expected (2, 4, 17)"});
  p_.d_log_sum.shape[2] = 17;
  p_.d_log_sum.dtype = DType::bfloat16;
  rejected(Kind::type, {"d_log_sum has dtype bfloat16", "expected float32"});
}
TEST_F(BackwardErrors, ExpandedGradients) {
  p_.dq.stride[0] = 0;
  rejected(Kind::value, {"dq has stride 0 in dimension 0"});
  p_ = call_.backward_params();
  p_.d_initial.mean.stride[3] = 0;
  rejected(Kind::value, {"d_initial.mean has stride 0 in dimension 3"});
}
TEST_F(BackwardErrors, DInitialWithoutInitial) {
  p_.initial = {};
  rejected(Kind::value, {"d_initial without an initial state"});
}

TEST(StepErrors, Arguments) {
  StateArrays state(DType::float32, 2, 1, 5, 6);
  Array q(DType::float32, {2, 2, 5}), k(DType::float32, {2, 1, 5}), v(DType::float32, {2, 1, 6}),
      y(DType::float32, {2, 2, 6});
  latte::LatentAttentionStep good;
  good.q = q.tensor(), good.k = k.tensor(), good.v = v.tensor(), good.y = y.tensor();
  good.state = state.state();
  auto p = good;
  p.q.rank = 4;
  expect_rejected(p, Kind::value, {"q has shape", "expected 3 dimensions"});
  p = good;
  p.k.shape[2] = 4;
  expect_rejected(p, Kind::value, {"k has shape (2, 1, 4)", "expected (2, 1, 5)"});
  p = good;
  p.state = {};
  expect_rejected(p, Kind::value, {"state.max has shape ()", "expected (2, 1, 5)"});
  p = good;
  p.state.mean.stride[0] = 0;
  expect_rejected(p, Kind::value, {"state.mean has stride 0 in dimension 0"});
  p = good;
  p.state.mean.stride[2] = 5;
  expect_rejected(p, Kind::value, {"state.mean has stride 5 in dimension 2 of shape (2, 1, 5, 6)"});
  p = good;
  p.state.norm.stride[0] = 4;
  expect_rejected(p, Kind::value, {"state.norm has stride 4 in dimension 0 of shape (2, 1, 5)"});
  p = good;
  p.state.norm.data = p.state.max.data;
  expect_rejected(p, Kind::value, {"state.max has the memory of state.norm", "expected memory"});
  p = good;
  p.y.dtype = DType::float64;
  expect_rejected(p, Kind::type, {"y has dtype float64", "expected float32"});
}

TEST(MacchiatoErrors, LatentHeads) {
  std::vector<float> memory(1000);
  const auto tensor = [&](std::vector<int64_t> shape) {
    latte::Tensor t{memory.data(), latte::DType::float32, static_cast<int64_t>(shape.size())};
    for (int64_t i = t.rank - 1, stride = 1; i >= 0; stride *= t.shape[i--]) {
      t.shape[i] = shape[static_cast<size_t>(i)];
      t.stride[i] = stride;
    }
    return t;
  };
  latte::MacchiatoForward p;
  p.window.q = tensor({1, 6, 5, 4});
  p.window.k = p.window.v = p.latent.v = tensor({1, 2, 5, 4});
  p.window.y = p.latent.y = tensor({1, 6, 5, 4});
  p.window.window = 3;
  p.q_latent = tensor({1, 6, 5, 1 + 3});
  p.latent.k = tensor({1, 2, 5, 3});
  EXPECT_GT(latte::workspace_bytes(p, 1), 0);
  // 3 heads would have been cut to 2, and 4 do not divide those of q.
  for (const int64_t heads : {1, 3, 4}) {
    p.latent.k = tensor({1, heads, 5, 3});
    expect_error(Kind::value,
                 {"[macchiato_attention] k_latent has " + std::to_string(heads) + " heads",
                  "a multiple of the 2 heads of k that divides the 6 heads of q"},
                 [&] { latte::workspace_bytes(p, 1); });
  }
}

TEST(MergeErrors, Arguments) {
  StateArrays a(DType::float32, 2, 1, 5, 6), b(DType::float32, 2, 1, 5, 7),
      c(DType::float64, 2, 1, 5, 6);
  expect_error(Kind::value,
               {"[state_merge] ", "b.mean has shape (2, 1, 5, 7)", "expected (2, 1, 5, 6)"},
               [&] { latte::state_merge({a.state(), b.state(), a.state()}); });
  expect_error(Kind::type, {"[state_merge] ", "b.max has dtype float64", "expected float32"},
               [&] { latte::state_merge({a.state(), c.state(), a.state()}); });
  expect_error(Kind::value, {"[state_merge] ", "a.mean has shape ()", "expected 4 dimensions"},
               [&] { latte::state_merge({{}, a.state(), a.state()}); });
}

TEST(Library, DescribesItself) {
  EXPECT_STRNE(latte::version(), "");
  EXPECT_FALSE(latte::cuda_built());
  if (const char* wanted = std::getenv("LATTE_CPU_ISA")) {
    EXPECT_STREQ(latte::cpu_isa(), wanted);
  }
}

TEST(Library, MeasuresItsPeak) {
  EXPECT_GT(latte::fma_rate(1, 1e-3), 1e8);
  EXPECT_GT(latte::fma_rate(2, 1e-3), 1e8);
  expect_error(Kind::value, {"[fma_rate] ", "got threads 0", "expected threads >= 1"},
               [] { latte::fma_rate(0, 1e-3); });
  expect_error(Kind::value, {"[fma_rate] ", "seconds -1.0", "seconds > 0"},
               [] { latte::fma_rate(1, -1); });
}

}  // namespace
}  // namespace testing_latte
