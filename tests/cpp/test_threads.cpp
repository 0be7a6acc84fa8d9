// SPDX-License-Identifier: Apache-2.0
// The same bits with any number of threads, in any batch, from any thread, after a fork.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <thread>

#include "harness.h"

using namespace latte_test;  // NOLINT(google-build-using-namespace)

namespace {

// Large enough to be worth several threads.
Case large(bool causal, DType dtype) {
  return {.batch = 2,
          .heads = 4,
          .kv_heads = 2,
          .tokens = 150,
          .latents = 33,
          .dim = 40,
          .causal = causal,
          .keys = Keys::jumps,
          .masked = true,
          .with_initial = causal,
          .q = dtype,
          .k = dtype,
          .v = dtype};
}

Outputs run_with(const Problem& p, const Case& c, int threads) {
  Call call(p, c);
  call.run_forward(threads);
  call.run_backward(threads);
  return call.outputs();
}

}  // namespace

TEST_SUITE_BEGIN("threads");

TEST_CASE("the same bits with any number of threads") {
  for (const bool causal : {true, false}) {
    for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16}) {
      const Case c = large(causal, dtype);
      const Problem p = make_problem(c);
      const Outputs one = run_with(p, c, 1);
      for (const int threads : {2, 3, 64}) CHECK(run_with(p, c, threads) == one);
      compare(one, reference::solve(p), c);
    }
  }
}

TEST_CASE("the same bits in any batch and any run") {
  for (const bool causal : {true, false}) {
    const Case c = large(causal, DType::float32);
    const Problem both = make_problem(c);
    const Outputs together = run_with(both, c, 2);
    CHECK(run_with(both, c, 2) == together);
    for (int64_t b = 0; b < 2; ++b) {
      const auto half = [b](const Doubles& x) {
        const auto n = static_cast<int64_t>(x.size()) / 2;
        return Doubles(x.begin() + b * n, x.begin() + (b + 1) * n);
      };
      Problem p = both;
      p.batch = 1;
      p.q = half(both.q);
      p.k = half(both.k);
      p.v = half(both.v);
      p.dy = half(both.dy);
      p.key_mask.assign(both.key_mask.begin() + b * p.tokens,
                        both.key_mask.begin() + (b + 1) * p.tokens);
      if (both.initial)
        p.initial = {half(both.initial->max), half(both.initial->norm), half(both.initial->mean)};
      p.d_final = {{}, half(both.d_final->norm), half(both.d_final->mean)};
      Case alone = c;
      alone.batch = 1;
      const Outputs o = run_with(p, alone, 1);
      CHECK(o.y == half(together.y));
      CHECK(o.dq == half(together.dq));
      CHECK(o.dk == half(together.dk));
      CHECK(o.dv == half(together.dv));
      CHECK(o.final_mean == half(together.final_mean));
      CHECK(o.d_initial_mean == half(together.d_initial_mean));
    }
  }
}

TEST_CASE("a packed sequence has the bits of the sequence alone") {
  for (const bool causal : {true, false}) {
    Case c = large(causal, DType::float32);
    c.batch = 1;
    c.masked = false;
    c.with_initial = false;
    c.with_d_final = false;
    c.cu_seqlens = {0, 5, 5, 75, 150};
    const Problem packed = make_problem(c);
    const Outputs together = run_with(packed, c, 2);
    for (size_t n = 0; n + 1 < c.cu_seqlens.size(); ++n) {
      const int64_t first = c.cu_seqlens[n], count = c.cu_seqlens[n + 1] - first;
      const auto rows = [&](const Doubles& x, int64_t heads, int64_t width) {
        Doubles out;
        for (int64_t h = 0; h < heads; ++h) {
          const auto at = x.begin() + (h * packed.tokens + first) * width;
          out.insert(out.end(), at, at + count * width);
        }
        return out;
      };
      Problem p = packed;
      p.cu_seqlens.clear();
      p.tokens = count;
      p.q = rows(packed.q, 4, 33);
      p.k = rows(packed.k, 2, 33);
      p.v = rows(packed.v, 2, 40);
      p.dy = rows(packed.dy, 4, 40);
      Case alone = c;
      alone.cu_seqlens.clear();
      alone.tokens = count;
      const Outputs o = run_with(p, alone, 1);
      CHECK(o.y == rows(together.y, 4, 40));
      CHECK(o.dq == rows(together.dq, 4, 33));
      CHECK(o.dk == rows(together.dk, 2, 33));
      CHECK(o.dv == rows(together.dv, 2, 40));
    }
  }
}

TEST_CASE("eight callers at once") {
  const Case cases[] = {large(true, DType::float32), large(false, DType::float32),
                        large(true, DType::bfloat16), large(false, DType::float64)};
  std::vector<Problem> problems;
  std::vector<Outputs> expected;
  for (const Case& c : cases) {
    problems.push_back(make_problem(c));
    expected.push_back(run_with(problems.back(), c, 1));
  }
  int right[8] = {};
  std::vector<std::thread> callers;
  for (int i = 0; i < 8; ++i) {
    callers.emplace_back([&, i] {
      const Case& c = cases[i % 4];
      for (int repeat = 0; repeat < 4; ++repeat) {
        // Assertions are made below, by the main thread.
        Call call(problems[i % 4], c);
        const int threads = 1 + repeat % 2;
        std::vector<char> workspace(std::max(latte::workspace_bytes(call.forward, threads),
                                             latte::workspace_bytes(call.backward, threads)));
        latte::latent_attention_forward(call.forward, workspace.data(), threads);
        latte::latent_attention_backward(call.backward, workspace.data(), threads);
        right[i] += call.outputs() == expected[i % 4];
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const int n : right) CHECK(n == 4);
}

TEST_CASE("a forked child computes the same") {
  const Case c = large(true, DType::float32);
  const Problem p = make_problem(c);
  const Outputs expected = run_with(p, c, 2);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(60);  // a child that waits for its parent's threads waits for ever
    Call call(p, c);
    std::vector<char> workspace(std::max(latte::workspace_bytes(call.forward, 2),
                                         latte::workspace_bytes(call.backward, 2)));
    latte::latent_attention_forward(call.forward, workspace.data(), 2);
    latte::latent_attention_backward(call.backward, workspace.data(), 2);
    _exit(call.outputs() == expected ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_SUITE_END();

TEST_SUITE_BEGIN("unknown_isa");

TEST_CASE("an unknown instruction set is refused by name") {
  const char* wanted = std::getenv("LATTE_CPU_ISA");
  if (!wanted || std::strcmp(wanted, "z80") != 0) return;
  std::string message;
  try {
    latte::cpu_isa();
  } catch (const latte::Error& e) {
    message = e.what();
    CHECK(e.kind == latte::Error::Kind::value);
  }
  CHECK(message.find("LATTE_CPU_ISA") != std::string::npos);
  CHECK(message.find("z80") != std::string::npos);
  CHECK(message.find("baseline") != std::string::npos);
}

TEST_SUITE_END();
