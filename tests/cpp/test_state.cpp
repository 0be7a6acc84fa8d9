// SPDX-License-Identifier: Apache-2.0
// The state: step by step equals at once, split equals whole, and the algebra of the merge.
#include <cstdlib>
#include <cstring>

#include "harness.h"

using namespace latte_test;  // NOLINT(google-build-using-namespace)

namespace {

constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

reference::State empty_state(int64_t n, int64_t heads, int64_t latents, int64_t dim) {
  const int64_t states = n * heads * latents;
  return {Doubles(states, -kInf), Doubles(states, 0.0), Doubles(states * dim, 0.0)};
}

reference::State values_of(const StateBuffers& s) {
  return {s.max.values(), s.norm.values(), s.mean.values()};
}

// Column t of a (B,H,T,C) array.
Doubles token(const Doubles& x, int64_t rows, int64_t tokens, int64_t width, int64_t t) {
  Doubles out;
  for (int64_t r = 0; r < rows; ++r) {
    const auto at = x.begin() + (r * tokens + t) * width;
    out.insert(out.end(), at, at + width);
  }
  return out;
}

void check_steps(const Case& c) {
  const Problem p = make_problem(c);
  const Solution expected = reference::solve(p);
  Buffer q(c.q, {p.batch, p.heads, p.latents}, c.layout);
  Buffer k(c.k, {p.batch, p.kv_heads, p.latents}, c.layout);
  Buffer v(c.v, {p.batch, p.kv_heads, p.dim}, c.layout);
  StateBuffers state(c.compute(), p.batch, p.kv_heads, p.latents, p.dim, c.layout);
  state.fill(p.initial ? *p.initial : empty_state(p.batch, p.kv_heads, p.latents, p.dim));
  Doubles y(expected.y.size());
  for (int64_t t = 0; t < p.tokens; ++t) {
    q.fill(token(p.q, p.batch * p.heads, p.tokens, p.latents, t));
    k.fill(token(p.k, p.batch * p.kv_heads, p.tokens, p.latents, t));
    v.fill(token(p.v, p.batch * p.kv_heads, p.tokens, p.dim, t));
    Buffer row(c.v, {p.batch, p.heads, p.dim}, c.layout);
    const latte::LatentAttentionStep step{q.tensor(),    k.tensor(),   v.tensor(),
                                          state.state(), row.tensor(), p.scale};
    Workspace workspace(latte::workspace_bytes(step, c.threads), t);
    latte::latent_attention_step(step, workspace.data(), c.threads);
    REQUIRE_MESSAGE(workspace.outside_is_untouched(), c.text());
    REQUIRE_MESSAGE(row.outside_is_untouched(), c.text());
    REQUIRE_MESSAGE(state.outside_is_untouched(), c.text());
    REQUIRE_MESSAGE((q.is_as_filled() && k.is_as_filled() && v.is_as_filled()), c.text());
    const Doubles got = row.values();
    for (int64_t r = 0; r < p.batch * p.heads; ++r)
      for (int64_t d = 0; d < p.dim; ++d) y[(r * p.tokens + t) * p.dim + d] = got[r * p.dim + d];
  }
  // Rounding errors add up over the steps.
  const double tolerance = tolerance_of(c) * (1 + static_cast<double>(p.tokens) / 50);
  compare("y of steps", y, expected.y, c.v, tolerance, c.text());
  const reference::State got = values_of(state);
  CHECK_MESSAGE(got.max == expected.final_max, c.text());
  compare("norm after steps", got.norm, expected.final_norm, c.compute(), tolerance, c.text());
  compare("mean after steps", got.mean, expected.final_mean, c.compute(), tolerance, c.text());
}

// The state of tokens [first, first + count) of p, computed by the library.
reference::State state_of(const Problem& p, const Case& c, int64_t first, int64_t count) {
  Problem part = p;
  part.cu_seqlens = {0, first, first + count, p.tokens};
  part.d_final.reset();
  part.initial.reset();
  Case packed = c;
  packed.with_initial = packed.with_d_final = false;
  Call call(part, packed);
  call.run_forward(1);
  const Outputs o = call.outputs();
  const int64_t states = p.kv_heads * p.latents;
  const auto middle = [](const Doubles& x, int64_t n) {
    return Doubles(x.begin() + n, x.begin() + 2 * n);
  };
  return {middle(o.final_max, states), middle(o.final_norm, states),
          middle(o.final_mean, states * p.dim)};
}

// merge in the library: into a third state, or into a or b.
enum class Into { fresh, a, b };
reference::State merge(const reference::State& a, const reference::State& b, const Case& c,
                       Into into = Into::fresh) {
  const int64_t n = c.batch, h = c.kv_heads;
  StateBuffers x(c.compute(), n, h, c.latents, c.dim, c.layout);
  StateBuffers y(c.compute(), n, h, c.latents, c.dim, Layout::contiguous);
  StateBuffers fresh(c.compute(), n, h, c.latents, c.dim, c.layout);
  x.fill(a);
  y.fill(b);
  StateBuffers& out = into == Into::a ? x : into == Into::b ? y : fresh;
  latte::state_merge({x.state(), y.state(), out.state()});
  CHECK((x.outside_is_untouched() && y.outside_is_untouched() && out.outside_is_untouched()));
  if (into != Into::a) CHECK(x.is_as_filled());
  if (into != Into::b) CHECK(y.is_as_filled());
  return values_of(out);
}

void check_same(const reference::State& got, const reference::State& expected, double tolerance) {
  CHECK(got.max == expected.max);
  REQUIRE(got.norm.size() == expected.norm.size());
  REQUIRE(got.mean.size() == expected.mean.size());
  double worst = 0;
  for (size_t i = 0; i < got.norm.size(); ++i)
    worst = std::max(worst, std::fabs(got.norm[i] - expected.norm[i]) / (expected.norm[i] + 1));
  for (size_t i = 0; i < got.mean.size(); ++i)
    worst = std::max(worst, std::fabs(got.mean[i] - expected.mean[i]) / 4);
  CHECK(worst < tolerance);
}

}  // namespace

TEST_SUITE_BEGIN("state");

TEST_CASE("token by token equals the whole sequence") {
  for (const int64_t width : {1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 43, 64, 65})
    for (const int64_t dim : {1, 8, 9, 43, 64})
      check_steps({.batch = 2,
                   .heads = 2,
                   .kv_heads = 1,
                   .tokens = 20,
                   .latents = width,
                   .dim = dim,
                   .with_initial = dim % 2 == 1});
  for (const DType dtype : kDTypes)
    for (const Layout layout : kLayouts)
      check_steps({.batch = 2,
                   .heads = 4,
                   .kv_heads = 2,
                   .tokens = 40,
                   .latents = 17,
                   .dim = 24,
                   .scale = 0.5,
                   .with_initial = true,
                   .q = dtype,
                   .k = dtype,
                   .v = dtype,
                   .layout = layout});
}

TEST_CASE("token by token with eventful keys") {
  for (const Keys keys : kEventfulKeys)
    for (const DType dtype : {DType::float32, DType::float64})
      check_steps({.batch = 2,
                   .tokens = 90,
                   .latents = 11,
                   .keys = keys,
                   .with_initial = true,
                   .q = dtype,
                   .k = dtype,
                   .v = dtype,
                   .threads = 2});
}

TEST_CASE("steps of nothing") { check_steps({.batch = 0, .tokens = 3}); }

TEST_CASE("the parts of a sequence, one continued by the next, equal the whole") {
  for (const Keys keys : {Keys::normal, Keys::jumps, Keys::rising, Keys::holes}) {
    for (const DType dtype : {DType::float32, DType::float64}) {
      const Case c{.tokens = 150,
                   .latents = 17,
                   .dim = 16,
                   .keys = keys,
                   .with_d_final = false,
                   .q = dtype,
                   .k = dtype,
                   .v = dtype};
      const Problem whole = make_problem(c);
      const Solution expected = reference::solve(whole);
      for (const int64_t cut : {0, 1, 37, 64, 65, 149, 150}) {
        reference::State state = empty_state(1, 2, 17, 16);
        Doubles y(expected.y.size());
        for (const auto& [first, count] : {std::pair{int64_t{0}, cut}, {cut, 150 - cut}}) {
          Problem part = whole;
          part.tokens = count;
          const auto slice = [&, first = first, count = count](const Doubles& x, int64_t width) {
            Doubles out;
            for (int64_t h = 0; h < 2; ++h) {
              const auto at = x.begin() + (h * 150 + first) * width;
              out.insert(out.end(), at, at + count * width);
            }
            return out;
          };
          part.q = slice(whole.q, 17);
          part.k = slice(whole.k, 17);
          part.v = slice(whole.v, 16);
          part.dy = slice(whole.dy, 16);
          part.initial = state;
          Case continued = c;
          continued.tokens = count;
          continued.with_initial = true;
          const Outputs o = run(part, continued);
          state = {o.final_max, o.final_norm, o.final_mean};
          for (int64_t h = 0; h < 2; ++h)
            std::copy_n(o.y.begin() + h * count * 16, count * 16,
                        y.begin() + (h * 150 + first) * 16);
        }
        const double tolerance = 3 * tolerance_of(c);
        compare("y", y, expected.y, dtype, tolerance, c.text());
        CHECK(state.max == expected.final_max);
        compare("norm", state.norm, expected.final_norm, dtype, tolerance, c.text());
        compare("mean", state.mean, expected.final_mean, dtype, tolerance, c.text());
      }
    }
  }
}

TEST_CASE("merge is the state of the union") {
  for (const Keys keys : {Keys::normal, Keys::jumps, Keys::soaring, Keys::holes, Keys::huge}) {
    for (const DType dtype : {DType::float32, DType::float64}) {
      for (const Layout layout : kLayouts) {
        const Case c{.tokens = 100,
                     .latents = 9,
                     .dim = 7,
                     .keys = keys,
                     .q = dtype,
                     .k = dtype,
                     .v = dtype,
                     .layout = layout};
        const double tolerance = dtype == DType::float64 ? 1e-14 : 2e-6;
        const Problem p = make_problem(c);
        const auto part = [&](int64_t first, int64_t count) {
          return state_of(p, c, first, count);
        };
        const reference::State all = part(0, 100);
        for (const int64_t cut : {0, 1, 50, 64, 99, 100}) {
          const reference::State left = part(0, cut), right = part(cut, 100 - cut);
          check_same(merge(left, right, c), all, tolerance);
          check_same(merge(right, left, c), all, tolerance);
          check_same(merge(left, right, c), reference::merge(left, right), tolerance);
          const reference::State fresh = merge(left, right, c);
          for (const Into into : {Into::a, Into::b}) {
            const reference::State in_place = merge(left, right, c, into);
            CHECK(in_place.max == fresh.max);
            CHECK(in_place.norm == fresh.norm);
            CHECK(in_place.mean == fresh.mean);
          }
        }
        const reference::State a = part(0, 30), b = part(30, 30), d = part(60, 40);
        check_same(merge(merge(a, b, c), d, c), merge(a, merge(b, d, c), c), tolerance);
      }
    }
  }
}

TEST_CASE("the empty state is the identity of the merge, bit by bit") {
  const Case c{.batch = 1, .tokens = 50, .latents = 9, .dim = 7, .keys = Keys::holes};
  const reference::State a = state_of(make_problem(c), c, 0, 50);
  const reference::State none = empty_state(1, 2, 9, 7);
  for (const reference::State& merged : {merge(a, none, c), merge(none, a, c)}) {
    CHECK(merged.max == a.max);
    CHECK(merged.norm == a.norm);
    CHECK(merged.mean == a.mean);
  }
  const reference::State nothing = merge(none, none, c);
  CHECK(nothing.max == none.max);
  CHECK(nothing.norm == none.norm);
  CHECK(nothing.mean == none.mean);
}

TEST_CASE("a state whose norm is 1 and whose max is the log-normaliser works like any other") {
  Case c{.tokens = 70, .latents = 9, .with_initial = true};
  Problem p = make_problem(c);
  for (size_t i = 0; i < p.initial->norm.size(); ++i) {
    if (p.initial->norm[i] == 0) continue;
    p.initial->max[i] = static_cast<float>(p.initial->max[i] + std::log(p.initial->norm[i]));
    p.initial->norm[i] = 1;
  }
  compare(run(p, c), reference::solve(p), c);
}

TEST_SUITE_END();

TEST_SUITE_BEGIN("threads");

TEST_CASE("the instruction set is the one asked for") {
  const char* wanted = std::getenv("LATTE_CPU_ISA");
  if (wanted && *wanted)
    CHECK(std::string(latte::cpu_isa()) == wanted);
  else
    CHECK(std::strlen(latte::cpu_isa()) > 0);
  MESSAGE("instruction set: " << latte::cpu_isa());
  CHECK(!latte::cuda_built());
  CHECK(std::string(latte::version()).find('.') != std::string::npos);
}

TEST_SUITE_END();
