// SPDX-License-Identifier: Apache-2.0
// Bad parameters: each throws, and the message names the op, the argument, got and expected.
#include <functional>

#include "harness.h"

using namespace latte_test;  // NOLINT(google-build-using-namespace)
using Kind = latte::Error::Kind;
using latte::LatentAttentionBackward;
using latte::LatentAttentionForward;
using latte::LatentAttentionStep;
using latte::StateMerge;
using latte::Tensor;

namespace {

constexpr double kNan = NAN;

const Case kCase{.batch = 2,
                 .heads = 4,
                 .kv_heads = 2,
                 .tokens = 5,
                 .latents = 3,
                 .dim = 6,
                 .masked = true,
                 .with_initial = true};

template <class Params>
struct Bad {
  const char* what;
  Kind kind;
  std::vector<std::string> words;  // all in the message, beside the op
  std::function<void(Params&)> spoil;
};

template <class Run>
void expect_error(const char* op, const char* what, Kind kind,
                  const std::vector<std::string>& words, Run run) {
  INFO(what);
  try {
    run();
    FAIL_CHECK("no error");
  } catch (const latte::Error& e) {
    const std::string message = e.what();
    INFO(message);
    CHECK(e.kind == kind);
    CHECK(message.rfind("[" + std::string(op) + "] ", 0) == 0);
    CHECK(message.find("expected") != std::string::npos);
    for (const std::string& word : words)
      CHECK_MESSAGE(message.find(word) != std::string::npos, word);
  }
}

// workspace_bytes and the op itself must both refuse.
template <class Params, class Op>
void expect_errors(const char* op, const std::vector<Bad<Params>>& cases, const Params& good,
                   Op run) {
  Workspace workspace(1 << 20);
  for (const auto& bad : cases) {
    Params params = good;
    bad.spoil(params);
    expect_error(op, bad.what, bad.kind, bad.words, [&] { latte::workspace_bytes(params, 1); });
    expect_error(op, bad.what, bad.kind, bad.words, [&] { run(params, workspace.data(), 1); });
  }
  Params params = good;
  for (const int threads : {0, -1}) {
    const std::vector<std::string> words = {"threads", std::to_string(threads)};
    expect_error(op, "threads", Kind::value, words,
                 [&] { latte::workspace_bytes(params, threads); });
    expect_error(op, "threads", Kind::value, words,
                 [&] { run(params, workspace.data(), threads); });
  }
  expect_error(op, "null workspace", Kind::value, {"workspace"}, [&] { run(params, nullptr, 1); });
}

// Cases that hold for the forward and the backward call alike.
template <class Params>
std::vector<Bad<Params>> bad_inputs() {
  using P = Params;
  static int32_t borders[] = {0, 2, 5};
  const auto pack = [](P& p, std::vector<int32_t> values) {
    std::copy(values.begin(), values.end(), borders);
    p.initial = {};
    p.q.shape[0] = p.k.shape[0] = p.v.shape[0] = 1;
    p.key_mask = {};
    p.cu_seqlens = {borders, DType::int32, 1, {static_cast<int64_t>(values.size())}, {1}};
  };
  return {
      {"rank of q",
       Kind::value,
       {"q has shape (2, 4, 5)", "4 dimensions"},
       [](P& p) { p.q.rank = 3; }},
      {"rank of k",
       Kind::value,
       {"k has shape (2, 2)", "4 dimensions"},
       [](P& p) { p.k.rank = 2; }},
      {"rank of v", Kind::value, {"v has shape ()", "4 dimensions"}, [](P& p) { p.v.rank = 0; }},
      {"batch of k",
       Kind::value,
       {"k has shape (3, 2, 5, 3)", "(2, 2, 5, 3)"},
       [](P& p) { p.k.shape[0] = 3; }},
      {"tokens of k",
       Kind::value,
       {"k has shape (2, 2, 4, 3)", "(2, 2, 5, 3)"},
       [](P& p) { p.k.shape[2] = 4; }},
      {"latents of k",
       Kind::value,
       {"k has shape (2, 2, 5, 9)", "(2, 2, 5, 3)"},
       [](P& p) { p.k.shape[3] = 9; }},
      {"batch of v",
       Kind::value,
       {"v has shape (1, 2, 5, 6)", "(2, 2, 5, 6)"},
       [](P& p) { p.v.shape[0] = 1; }},
      {"heads of v",
       Kind::value,
       {"v has shape (2, 4, 5, 6)", "(2, 2, 5, 6)"},
       [](P& p) { p.v.shape[1] = 4; }},
      {"tokens of v",
       Kind::value,
       {"v has shape (2, 2, 6, 6)", "(2, 2, 5, 6)"},
       [](P& p) { p.v.shape[2] = 6; }},
      {"heads not a multiple",
       Kind::value,
       {"q has 4 heads", "multiple", "3"},
       [](P& p) { p.k.shape[1] = p.v.shape[1] = 3; }},
      {"no heads", Kind::value, {"0 heads", "at least 1"}, [](P& p) { p.q.shape[1] = 0; }},
      {"no key/value heads",
       Kind::value,
       {"0 key/value heads", "at least 1"},
       [](P& p) { p.k.shape[1] = p.v.shape[1] = 0; }},
      {"no latents",
       Kind::value,
       {"0 latents", "at least 1"},
       [](P& p) { p.q.shape[3] = p.k.shape[3] = 0; }},
      {"no channels", Kind::value, {"0 channels", "at least 1"}, [](P& p) { p.v.shape[3] = 0; }},
      {"null q", Kind::value, {"q has no data"}, [](P& p) { p.q.data = nullptr; }},
      {"null k", Kind::value, {"k has no data"}, [](P& p) { p.k.data = nullptr; }},
      {"null v", Kind::value, {"v has no data"}, [](P& p) { p.v.data = nullptr; }},
      {"negative size",
       Kind::value,
       {"-1"},
       [](P& p) { p.q.shape[2] = p.k.shape[2] = p.v.shape[2] = -1; }},
      {"integer q",
       Kind::type,
       {"q has dtype int64", "float32"},
       [](P& p) { p.q.dtype = DType::int64; }},
      {"boolean k",
       Kind::type,
       {"k has dtype bool", "bfloat16"},
       [](P& p) { p.k.dtype = DType::boolean; }},
      {"integer v",
       Kind::type,
       {"v has dtype int32", "float16"},
       [](P& p) { p.v.dtype = DType::int32; }},
      {"double q only",
       Kind::type,
       {"float64, float32, float32"},
       [](P& p) { p.q.dtype = DType::float64; }},
      {"double v only",
       Kind::type,
       {"float32, float32, float64"},
       [](P& p) { p.v.dtype = DType::float64; }},
      {"NaN scale", Kind::value, {"scale is", "finite"}, [](P& p) { p.scale = kNan; }},
      {"inf scale", Kind::value, {"scale is inf", "finite"}, [](P& p) { p.scale = kInf; }},
      {"mask dtype",
       Kind::type,
       {"key_mask has dtype float32", "bool"},
       [](P& p) { p.key_mask.dtype = DType::float32; }},
      {"mask shape",
       Kind::value,
       {"key_mask has shape (2, 6)", "(2, 5)"},
       [](P& p) { p.key_mask.shape[1] = 6; }},
      {"mask rank",
       Kind::value,
       {"key_mask has shape (2,)", "(2, 5)"},
       [](P& p) { p.key_mask.rank = 1; }},
      {"borders dtype",
       Kind::type,
       {"cu_seqlens has dtype float32", "int32 or int64"},
       [pack](P& p) {
         pack(p, {0, 2, 5});
         p.cu_seqlens.dtype = DType::float32;
       }},
      {"borders rank",
       Kind::value,
       {"cu_seqlens has shape (3, 1)", "1 dimension"},
       [pack](P& p) {
         pack(p, {0, 2, 5});
         p.cu_seqlens.rank = 2;
         p.cu_seqlens.shape[1] = 1;
       }},
      {"no borders", Kind::value, {"cu_seqlens has 0 elements"}, [pack](P& p) { pack(p, {}); }},
      {"packed batch",
       Kind::value,
       {"batch 2", "expected 1"},
       [pack](P& p) {
         pack(p, {0, 2, 5});
         p.q.shape[0] = p.k.shape[0] = p.v.shape[0] = 2;
       }},
      {"first border",
       Kind::value,
       {"cu_seqlens[0] is 1", "expected 0"},
       [pack](P& p) { pack(p, {1, 2, 5}); }},
      {"falling borders",
       Kind::value,
       {"cu_seqlens[2] is 1", "at least 2"},
       [pack](P& p) { pack(p, {0, 2, 1}); }},
      {"last border",
       Kind::value,
       {"cu_seqlens", "4", "expected 5"},
       [pack](P& p) { pack(p, {0, 2, 4}); }},
      {"border past the end",
       Kind::value,
       {"cu_seqlens", "9", "expected 5"},
       [pack](P& p) { pack(p, {0, 2, 9}); }},
      {"state in both directions",
       Kind::value,
       {"state", "causal"},
       [](P& p) { p.causal = false; }},
      {"state sequences",
       Kind::value,
       {"state.max has shape (3, 2, 3)", "(2, 2, 3)"},
       [](P& p) { p.initial.max.shape[0] = 3; }},
      {"state latents",
       Kind::value,
       {"state.norm has shape (2, 2, 4)", "(2, 2, 3)"},
       [](P& p) { p.initial.norm.shape[2] = 4; }},
      {"state channels",
       Kind::value,
       {"state.mean has shape (2, 2, 3, 5)", "(2, 2, 3, 6)"},
       [](P& p) { p.initial.mean.shape[3] = 5; }},
      {"half a state",
       Kind::value,
       {"state.norm has shape ()", "(2, 2, 3)"},
       [](P& p) { p.initial.norm = {}; }},
      {"state dtype",
       Kind::type,
       {"state.mean has dtype bfloat16", "float32"},
       [](P& p) { p.initial.mean.dtype = DType::bfloat16; }},
  };
}

}  // namespace

TEST_SUITE_BEGIN("errors");

TEST_CASE("forward") {
  Call call(make_problem(kCase), kCase);
  using P = LatentAttentionForward;
  auto cases = bad_inputs<P>();
  const std::vector<Bad<P>> more = {
      {"y shape",
       Kind::value,
       {"y has shape (2, 2, 5, 6)", "(2, 4, 5, 6)"},
       [](P& p) { p.y.shape[1] = 2; }},
      {"y dtype",
       Kind::type,
       {"y has dtype float64", "float32"},
       [](P& p) { p.y.dtype = DType::float64; }},
      {"null y", Kind::value, {"y has no data"}, [](P& p) { p.y.data = nullptr; }},
      {"expanded y",
       Kind::value,
       {"y has stride 0", "dimension 2"},
       [](P& p) { p.y.stride[2] = 0; }},
      {"final shape",
       Kind::value,
       {"final.mean has shape (2, 2, 3, 7)", "(2, 2, 3, 6)"},
       [](P& p) { p.final.mean.shape[3] = 7; }},
      {"final dtype",
       Kind::type,
       {"final.max has dtype float64", "float32"},
       [](P& p) { p.final.max.dtype = DType::float64; }},
      {"half a final state",
       Kind::value,
       {"final.max has shape ()"},
       [](P& p) { p.final.max = {}; }},
      {"expanded final.mean",
       Kind::value,
       {"final.mean has stride 0"},
       [](P& p) { p.final.mean.stride[1] = 0; }},
      {"expanded final.max",
       Kind::value,
       {"final.max has stride 0"},
       [](P& p) { p.final.max.stride[1] = 0; }},
      {"expanded final.norm",
       Kind::value,
       {"final.norm has stride 0"},
       [](P& p) { p.final.norm.stride[0] = 0; }},
  };
  cases.insert(cases.end(), more.begin(), more.end());
  expect_errors("latent_attention", cases, call.forward, latte::latent_attention_forward);
}

TEST_CASE("backward") {
  Call call(make_problem(kCase), kCase);
  using P = LatentAttentionBackward;
  auto cases = bad_inputs<P>();
  const std::vector<Bad<P>> more = {
      {"dy shape",
       Kind::value,
       {"dy has shape (2, 4, 5, 5)", "(2, 4, 5, 6)"},
       [](P& p) { p.dy.shape[3] = 5; }},
      {"dy dtype",
       Kind::type,
       {"dy has dtype float16", "float32"},
       [](P& p) { p.dy.dtype = DType::float16; }},
      {"null dy", Kind::value, {"dy has no data"}, [](P& p) { p.dy.data = nullptr; }},
      {"dq shape",
       Kind::value,
       {"dq has shape (2, 4, 5, 4)", "(2, 4, 5, 3)"},
       [](P& p) { p.dq.shape[3] = 4; }},
      {"dk shape",
       Kind::value,
       {"dk has shape (2, 4, 5, 3)", "(2, 2, 5, 3)"},
       [](P& p) { p.dk.shape[1] = 4; }},
      {"dv dtype",
       Kind::type,
       {"dv has dtype bfloat16", "float32"},
       [](P& p) { p.dv.dtype = DType::bfloat16; }},
      {"null dv", Kind::value, {"dv has no data"}, [](P& p) { p.dv.data = nullptr; }},
      {"expanded dk",
       Kind::value,
       {"dk has stride 0", "dimension 0"},
       [](P& p) { p.dk.stride[0] = 0; }},
      {"d_final shape",
       Kind::value,
       {"d_final.norm has shape (2, 1, 3)", "(2, 2, 3)"},
       [](P& p) { p.d_final.norm.shape[1] = 1; }},
      {"d_final dtype",
       Kind::type,
       {"d_final.mean has dtype float64", "float32"},
       [](P& p) { p.d_final.mean.dtype = DType::float64; }},
      {"half a d_final",
       Kind::value,
       {"d_final.mean has shape ()"},
       [](P& p) { p.d_final.mean = {}; }},
      {"d_initial without initial",
       Kind::value,
       {"d_initial", "initial state"},
       [](P& p) { p.initial = {}; }},
      {"d_initial shape",
       Kind::value,
       {"d_initial.mean has shape (2, 2, 1, 6)", "(2, 2, 3, 6)"},
       [](P& p) { p.d_initial.mean.shape[2] = 1; }},
      {"expanded d_initial.mean",
       Kind::value,
       {"d_initial.mean has stride 0"},
       [](P& p) { p.d_initial.mean.stride[3] = 0; }},
      {"expanded d_initial.norm",
       Kind::value,
       {"d_initial.norm has stride 0"},
       [](P& p) { p.d_initial.norm.stride[2] = 0; }},
  };
  cases.insert(cases.end(), more.begin(), more.end());
  expect_errors("latent_attention_backward", cases, call.backward,
                latte::latent_attention_backward);
}

TEST_CASE("step") {
  Buffer q(DType::float32, {2, 4, 3}), k(DType::float32, {2, 2, 3}), v(DType::float32, {2, 2, 6});
  Buffer y(DType::float32, {2, 4, 6});
  StateBuffers state(DType::float32, 2, 2, 3, 6, Layout::contiguous);
  const LatentAttentionStep good{q.tensor(), k.tensor(), v.tensor(), state.state(), y.tensor()};
  using P = LatentAttentionStep;
  const std::vector<Bad<P>> cases = {
      {"rank of q",
       Kind::value,
       {"q has shape (2, 4)", "3 dimensions"},
       [](P& p) { p.q.rank = 2; }},
      {"rank of k",
       Kind::value,
       {"k has shape (2, 2, 3, 0)", "3 dimensions"},
       [](P& p) { p.k.rank = 4; }},
      {"rank of v", Kind::value, {"v has shape (2,)", "3 dimensions"}, [](P& p) { p.v.rank = 1; }},
      {"latents of k",
       Kind::value,
       {"k has shape (2, 2, 4)", "(2, 2, 3)"},
       [](P& p) { p.k.shape[2] = 4; }},
      {"sequences of v",
       Kind::value,
       {"v has shape (1, 2, 6)", "(2, 2, 6)"},
       [](P& p) { p.v.shape[0] = 1; }},
      {"heads not a multiple",
       Kind::value,
       {"q has 3 heads", "multiple"},
       [](P& p) { p.q.shape[1] = 3; }},
      {"no channels", Kind::value, {"0 channels"}, [](P& p) { p.v.shape[2] = 0; }},
      {"integer q", Kind::type, {"q has dtype int32"}, [](P& p) { p.q.dtype = DType::int32; }},
      {"double k only",
       Kind::type,
       {"float32, float64, float32"},
       [](P& p) { p.k.dtype = DType::float64; }},
      {"null q", Kind::value, {"q has no data"}, [](P& p) { p.q.data = nullptr; }},
      {"NaN scale", Kind::value, {"scale"}, [](P& p) { p.scale = kNan; }},
      {"y shape",
       Kind::value,
       {"y has shape (2, 4, 5)", "(2, 4, 6)"},
       [](P& p) { p.y.shape[2] = 5; }},
      {"y dtype", Kind::type, {"y has dtype float16"}, [](P& p) { p.y.dtype = DType::float16; }},
      {"expanded y", Kind::value, {"y has stride 0"}, [](P& p) { p.y.stride[0] = 0; }},
      {"no state", Kind::value, {"state.max has shape ()"}, [](P& p) { p.state = {}; }},
      {"state shape",
       Kind::value,
       {"state.mean has shape (2, 2, 3, 3)", "(2, 2, 3, 6)"},
       [](P& p) { p.state.mean.shape[3] = 3; }},
      {"state dtype",
       Kind::type,
       {"state.norm has dtype float64", "float32"},
       [](P& p) { p.state.norm.dtype = DType::float64; }},
      {"expanded state.max",
       Kind::value,
       {"state.max has stride 0"},
       [](P& p) { p.state.max.stride[2] = 0; }},
      {"expanded state.mean",
       Kind::value,
       {"state.mean has stride 0"},
       [](P& p) { p.state.mean.stride[0] = 0; }},
  };
  expect_errors("latent_attention_step", cases, good, latte::latent_attention_step);
}

TEST_CASE("merge") {
  StateBuffers a(DType::float32, 2, 2, 3, 6, Layout::contiguous), b = a, out = a;
  const StateMerge good{a.state(), b.state(), out.state()};
  using P = StateMerge;
  const std::vector<Bad<P>> cases = {
      {"rank",
       Kind::value,
       {"a.mean has shape (2, 2, 3)", "4 dimensions"},
       [](P& p) { p.a.mean.rank = 3; }},
      {"no state", Kind::value, {"a.mean has shape ()"}, [](P& p) { p.a = {}; }},
      {"dtype",
       Kind::type,
       {"a.mean has dtype float16", "float32 or float64"},
       [](P& p) { p.a.mean.dtype = DType::float16; }},
      {"a.max",
       Kind::value,
       {"a.max has shape (2, 2, 4)", "(2, 2, 3)"},
       [](P& p) { p.a.max.shape[2] = 4; }},
      {"b.mean",
       Kind::value,
       {"b.mean has shape (2, 2, 3, 5)", "(2, 2, 3, 6)"},
       [](P& p) { p.b.mean.shape[3] = 5; }},
      {"b dtype",
       Kind::type,
       {"b.norm has dtype float64", "float32"},
       [](P& p) { p.b.norm.dtype = DType::float64; }},
      {"out.norm",
       Kind::value,
       {"out.norm has shape (1, 2, 3)", "(2, 2, 3)"},
       [](P& p) { p.out.norm.shape[0] = 1; }},
      {"null out.max",
       Kind::value,
       {"out.max has no data"},
       [](P& p) { p.out.max.data = nullptr; }},
      {"expanded out",
       Kind::value,
       {"out.mean has stride 0"},
       [](P& p) { p.out.mean.stride[3] = 0; }},
  };
  for (const auto& bad : cases) {
    P params = good;
    bad.spoil(params);
    expect_error("state_merge", bad.what, bad.kind, bad.words, [&] { latte::state_merge(params); });
  }
}

TEST_CASE("nothing is written when a call is refused") {
  Call call(make_problem(kCase), kCase);
  call.forward.scale = kNan;
  call.backward.scale = kNan;
  Workspace workspace(1 << 20);
  CHECK_THROWS_AS(latte::latent_attention_forward(call.forward, workspace.data(), 1), latte::Error);
  CHECK_THROWS_AS(latte::latent_attention_backward(call.backward, workspace.data(), 1),
                  latte::Error);
  const Outputs o = call.outputs();
  for (const Doubles* x : {&o.y, &o.final_mean, &o.dq, &o.dk, &o.dv, &o.d_initial_mean})
    for (const double value : *x) CHECK(std::isnan(value));
}

TEST_SUITE_END();
