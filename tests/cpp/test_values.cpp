// SPDX-License-Identifier: Apache-2.0
// Forward values, states and gradients against the double reference.
#include "harness.h"

using namespace latte_test;  // NOLINT(google-build-using-namespace)

namespace {

// Around the vector widths (2, 4, 8, 16 lanes), the register tiles and the authors' own heads (43
// and 10); tokens around the chunk of 64.
constexpr int64_t kWidths[] = {1, 2, 3, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 43, 64, 65};
constexpr int64_t kTokens[] = {0, 1, 2, 63, 64, 65, 129};
constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

}  // namespace

TEST_SUITE_BEGIN("values");

TEST_CASE("every size") {
  unsigned seed = 0;
  for (const int64_t latents : kWidths) {
    for (const int64_t dim : kWidths) {
      for (const bool causal : {true, false}) {
        // Every pair with one length, every length with every width several times over.
        const int64_t tokens = kTokens[seed++ * 5 % 7];
        check({.heads = 1,
               .kv_heads = 1,
               .tokens = tokens,
               .latents = latents,
               .dim = dim,
               .causal = causal,
               .with_initial = causal,
               .seed = seed});
      }
    }
  }
  for (const int64_t tokens : kTokens)
    for (const auto& [latents, dim] : {std::pair{1, 1}, {43, 43}, {10, 32}, {64, 64}, {8, 65}})
      for (const bool causal : {true, false})
        check({.batch = 2,
               .tokens = tokens,
               .latents = latents,
               .dim = dim,
               .causal = causal,
               .with_initial = causal});
}

TEST_CASE("no batch and no sequences") {
  for (const bool causal : {true, false}) {
    check({.batch = 0, .causal = causal});
    check({.tokens = 0, .causal = causal, .cu_seqlens = {0}});
  }
}

TEST_CASE("every dtype in every layout") {
  for (const DType dtype : kDTypes)
    for (const Layout layout : kLayouts)
      for (const bool causal : {true, false})
        for (const auto& [latents, dim] : {std::pair{17, 9}, {32, 64}, {43, 43}})
          check({.batch = 2,
                 .heads = 4,
                 .tokens = 70,
                 .latents = latents,
                 .dim = dim,
                 .causal = causal,
                 .with_initial = causal,
                 .q = dtype,
                 .k = dtype,
                 .v = dtype,
                 .layout = layout,
                 .seed = static_cast<unsigned>(layout)});
}

TEST_CASE("mixed dtypes") {
  constexpr DType floats[] = {DType::float32, DType::bfloat16, DType::float16};
  for (const DType q : floats)
    for (const DType k : floats)
      for (const DType v : floats)
        for (const bool causal : {true, false})
          check({.tokens = 67,
                 .latents = 16,
                 .dim = 24,
                 .causal = causal,
                 .with_initial = causal,
                 .q = q,
                 .k = k,
                 .v = v});
}

TEST_CASE("expanded inputs") {
  for (unsigned dims = 1; dims < 16; ++dims)
    for (const DType dtype : kDTypes)
      for (const bool causal : {true, false})
        check({.batch = 2,
               .tokens = 66,
               .latents = 16,
               .dim = 16,
               .causal = causal,
               .q = dtype,
               .k = dtype,
               .v = dtype,
               .expanded = dims});
}

TEST_CASE("key masks, with NaN and inf behind them") {
  for (const DType dtype : kDTypes)
    for (const bool causal : {true, false})
      for (const int64_t kv_heads : {4, 2, 1})
        for (const Layout layout : {Layout::contiguous, Layout::reversed, Layout::gaps})
          check({.batch = 3,
                 .heads = 4,
                 .kv_heads = kv_heads,
                 .tokens = 130,
                 .latents = 16,
                 .dim = 16,
                 .causal = causal,
                 .masked = true,
                 .with_initial = causal,
                 .q = dtype,
                 .k = dtype,
                 .v = dtype,
                 .layout = layout});
}

TEST_CASE("a mask without any real token leaves nothing") {
  for (const bool causal : {true, false}) {
    const Case c{.tokens = 70, .causal = causal, .masked = true};
    Problem p = make_problem(c);
    p.key_mask.assign(p.key_mask.size(), 0);
    const Outputs got = run(p, c);
    compare(got, reference::solve(p), c);
    for (const double y : got.y) CHECK(y == 0);
    for (const double norm : got.final_norm) CHECK(norm == 0);
  }
}

TEST_CASE("packed sequences, some of them empty") {
  const std::vector<int64_t> cuts[] = {{0, 0, 1, 64, 64, 129, 200, 200},
                                       {0, 200},
                                       {0, 0, 200},
                                       {0, 63, 127, 200},
                                       {0, 1, 2, 3, 200, 200, 200}};
  for (const auto& cu_seqlens : cuts)
    for (const bool causal : {true, false})
      for (const int64_t kv_heads : {4, 2})
        for (const bool masked : {false, true})
          check({.heads = 4,
                 .kv_heads = kv_heads,
                 .tokens = 200,
                 .latents = 16,
                 .dim = 20,
                 .causal = causal,
                 .masked = masked,
                 .cu_seqlens = cu_seqlens,
                 .with_initial = causal,
                 .seed = static_cast<unsigned>(kv_heads + masked)});
}

TEST_CASE("grouped heads") {
  for (const auto& [heads, kv_heads] : {std::pair{4, 1}, {6, 2}, {8, 8}, {3, 1}})
    for (const bool causal : {true, false})
      for (const DType dtype : kDTypes)
        for (const Layout layout : {Layout::contiguous, Layout::swapped, Layout::odd})
          check({.batch = 2,
                 .heads = heads,
                 .kv_heads = kv_heads,
                 .tokens = 67,
                 .latents = 15,
                 .dim = 16,
                 .causal = causal,
                 .with_initial = causal,
                 .q = dtype,
                 .k = dtype,
                 .v = dtype,
                 .layout = layout});
}

TEST_CASE("optional outputs and gradients may be absent") {
  for (const bool causal : {true, false})
    for (unsigned absent = 0; absent < 8; ++absent)
      check({.tokens = 80,
             .causal = causal,
             .with_initial = causal,
             .with_final = (absent & 1) == 0,
             .with_d_final = (absent & 2) == 0,
             .with_d_initial = (absent & 4) == 0});
}

TEST_CASE("scale multiplies both logits") {
  for (const double scale : {0.125, 3.0, -1.0, 0.0, 1.0 / 3})
    for (const bool causal : {true, false})
      for (const DType dtype : kDTypes)
        check({.tokens = 80,
               .latents = 16,
               .causal = causal,
               .scale = scale,
               .with_initial = causal,
               .q = dtype,
               .k = dtype,
               .v = dtype});
}

TEST_CASE("keys that rise, jump, fall, vanish") {
  for (const Keys keys : kEventfulKeys)
    for (const bool causal : {true, false})
      for (const DType dtype : {DType::float32, DType::float64})
        for (const auto& [latents, dim] : {std::pair{8, 8}, {33, 17}, {64, 64}})
          for (const int64_t kv_heads : {2, 1}) {
            // 3e38 squared by a factor above 1 or a half format does not fit: scale 1, no halves.
            check({.kv_heads = kv_heads,
                   .tokens = 200,
                   .latents = latents,
                   .dim = dim,
                   .causal = causal,
                   .keys = keys,
                   .with_initial = causal,
                   .q = dtype,
                   .k = dtype,
                   .v = dtype});
          }
}

TEST_CASE("eventful keys in half precision, masked, packed, strided") {
  for (const Keys keys : {Keys::rising, Keys::jumps, Keys::steps, Keys::holes})
    for (const DType dtype : {DType::bfloat16, DType::float16})
      for (const bool causal : {true, false})
        check({.heads = 4,
               .tokens = 150,
               .latents = 16,
               .dim = 24,
               .causal = causal,
               .keys = keys,
               .masked = true,
               .cu_seqlens = {0, 70, 70, 150},
               .with_initial = causal,
               .q = dtype,
               .k = dtype,
               .v = dtype,
               .layout = Layout::gaps});
}

TEST_CASE("large query logits") {
  for (const double size : {100.0, 1e4, 1e30})
    for (const DType dtype : {DType::float32, DType::float64})
      check({.tokens = 70, .latents = 20, .logit_size = size, .q = dtype, .k = dtype, .v = dtype});
}

TEST_CASE("a row does not depend on later tokens, whatever they hold") {
  for (const int64_t latents : {8, 64}) {
    const Case c{.heads = 1,
                 .kv_heads = 1,
                 .tokens = 140,
                 .latents = latents,
                 .dim = 16,
                 .keys = Keys::jumps};
    Problem p = make_problem(c);
    const Solution expected = reference::solve(p);
    for (const int64_t from : {1, 40, 63, 64, 65, 139}) {
      for (const double poison : {static_cast<double>(NAN), kInf, 3e38}) {
        Problem spoilt = p;
        for (int64_t i = from * latents; i < p.tokens * latents; ++i)
          spoilt.q[i] = spoilt.k[i] = poison;
        for (int64_t i = from * p.dim; i < p.tokens * p.dim; ++i) spoilt.v[i] = poison;
        Call call(spoilt, c);
        call.run_forward(1);
        Doubles y = call.outputs().y;
        reference::Reals rows = expected.y;
        y.resize(from * p.dim);
        rows.resize(from * p.dim);
        compare("y before the poison", y, rows, c.v, tolerance_of(c),
                c.text() + " from " + std::to_string(from) + " on " + std::to_string(poison));
      }
    }
  }
}

TEST_CASE("a NaN query spoils its own row and no other") {
  for (const bool causal : {true, false}) {
    const Case c{.tokens = 70, .latents = 9, .causal = causal};
    Problem p = make_problem(c);
    const Solution expected = reference::solve(p);
    p.q[66 * 9 + 4] = NAN;
    Call call(p, c);
    call.run_forward(1);
    Doubles y = call.outputs().y;
    for (int64_t d = 0; d < p.dim; ++d) {
      CHECK(std::isnan(y[66 * p.dim + d]));
      y[66 * p.dim + d] = expected.y[66 * p.dim + d].value;
    }
    compare("y", y, expected.y, c.v, tolerance_of(c), c.text());
  }
}

// With one latent and one token y is v, with two equal keys y_1 is the midpoint of v_0 and v_1: a
// tie between neighbours of a 16-bit format. So every number and every tie of the format passes.
TEST_CASE("16-bit formats convert every number exactly and round every tie to even") {
  for (const DType dtype : {DType::bfloat16, DType::float16}) {
    for (const bool vectors : {true, false}) {
      const auto value = [&](int64_t bits) {
        return dtype == DType::float16 ? float16_value(static_cast<uint16_t>(bits))
                                       : bfloat16_value(static_cast<uint16_t>(bits));
      };
      Case c{.heads = 1,
             .kv_heads = 1,
             .tokens = 2,
             .latents = 1,
             .dim = 65536,
             .q = dtype,
             .k = dtype,
             .v = dtype,
             .layout = vectors ? Layout::contiguous : Layout::gaps};
      Problem p =
          make_problem({.heads = 1, .kv_heads = 1, .tokens = 2, .latents = 1, .dim = 65536});
      p.q = p.k = {0, 0};
      for (int64_t bits = 0; bits < 65536; ++bits) {
        p.v[bits] = value(bits);
        const double next = value(bits + 1);
        p.v[65536 + bits] = std::isfinite(next) ? next : value(bits);
      }
      Call call(p, c);
      call.run_forward(1);
      const Doubles y = call.outputs().y;
      int64_t wrong = 0;
      for (int64_t i = 0; i < 65536; ++i) {
        const double first = p.v[i], middle = quantise((first + p.v[65536 + i]) / 2, dtype);
        // The kernels flush subnormal numbers of the compute type.
        const double least = dtype == DType::bfloat16 ? 0x1p-125 : 0;
        const auto same = [&](double got, double expected) {
          return std::isnan(expected) ? std::isnan(got)
                                      : got == expected || std::fabs(got - expected) < least;
        };
        const bool sum_fits = std::fabs(first) < 0x1p126;
        const bool right = same(y[i], first) && (!sum_fits || same(y[65536 + i], middle));
        if (!right && wrong++ < 5)
          MESSAGE(name(dtype) << " bits " << i << ": " << first << ", " << p.v[65536 + i]
                              << " gave " << y[i] << ", " << y[65536 + i]);
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_SUITE_END();
