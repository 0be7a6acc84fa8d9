// SPDX-License-Identifier: Apache-2.0
// Threads, in the library and around it, and the workspace they share out.
#include <gtest/gtest.h>

#include <thread>

#include "problem.h"

namespace testing_latte {
namespace {

// Large enough that a second thread is worth waking.
Case large_case(bool causal, DType dtype) {
  Case c;
  c.batch = 3, c.heads = 4, c.kv_heads = 2, c.tokens = 97, c.latents = 33, c.dim = 43;
  c.causal = causal, c.initial = causal, c.masked = true;
  c.set_type(dtype);
  return c;
}

std::vector<unsigned char> outputs(const Case& c) {
  Call call(c);
  call.forward(), call.backward();
  return call.output_bytes();
}

TEST(Threads, CountDoesNotChangeABit) {
  for (const DType dtype : kTypes)
    for (const bool causal : {true, false}) {
      Case c = large_case(causal, dtype);
      SCOPED_TRACE(c.text());
      const auto one = outputs(c);
      for (const int threads : {2, 3, 64}) {
        c.threads = threads;
        EXPECT_EQ(outputs(c), one) << threads << " threads";
      }
    }
}

TEST(Threads, PackedCountDoesNotChangeABit) {
  Case c = large_case(true, DType::float32);
  c.batch = 1, c.tokens = 200, c.borders = {0, 0, 100, 101, 200};
  const auto one = outputs(c);
  c.threads = 2;
  EXPECT_EQ(outputs(c), one);
}

// Sequences long enough to be cut, against the token by token reference.
TEST(Threads, ACutSequenceIsTheWhole) {
  for (const bool causal : {true, false})
    for (const Keys keys : {Keys::normal, Keys::rising, Keys::climbing})
      for (const int threads : {2, 5}) {
        Case c;
        c.heads = 2, c.kv_heads = 1, c.tokens = 2500, c.latents = 5, c.dim = 9;
        c.causal = causal, c.initial = causal, c.masked = true, c.keys = keys;
        c.threads = threads;
        c.set_type(threads == 2 ? DType::float64 : DType::float32);
        SCOPED_TRACE(c.text());
        Call call(c);
        call.forward(), call.check_forward();
        call.backward(), call.check_backward();
      }
}

TEST(Threads, TheLongOneOfPackedSequencesIsCut) {
  Case c;
  c.heads = 1, c.kv_heads = 1, c.latents = 9, c.dim = 5, c.tokens = 2500;
  c.borders = {0, 0, 30, 2200, 2500}, c.initial = true, c.threads = 3;
  Call call(c);
  call.forward(), call.check_forward();
  call.backward(), call.check_backward();
}

TEST(Threads, ConcurrentCallers) {
  for (const int inner : {1, 2}) {
    std::vector<Case> cases;
    for (unsigned i = 0; i < 4; ++i) {
      cases.push_back(large_case(i % 2, kTypes[i]));
      cases.back().threads = inner;
    }
    std::vector<std::vector<unsigned char>> expected, got(cases.size());
    for (const Case& c : cases) expected.push_back(outputs(c));
    std::vector<std::thread> callers;
    for (size_t i = 0; i < cases.size(); ++i)
      callers.emplace_back([&, i] {
        for (int repeat = 0; repeat < 3; ++repeat) got[i] = outputs(cases[i]);
      });
    for (std::thread& caller : callers) caller.join();
    EXPECT_EQ(got, expected);
  }
}

TEST(Threads, ShareInputs) {
  Call call(large_case(true, DType::float32));
  call.forward();
  const auto expected = call.y.bytes();
  std::vector<Array> results;
  for (int i = 0; i < 4; ++i)
    results.emplace_back(
        call.c.v_type, std::vector<int64_t>{call.c.batch, call.c.heads, call.c.tokens, call.c.dim});
  std::vector<std::thread> callers;
  for (Array& y : results)
    callers.emplace_back([&call, &y] {
      auto params = call.forward_params();
      params.y = y.tensor();
      params.final = {};
      run(params, 1);
    });
  for (std::thread& caller : callers) caller.join();
  for (const Array& y : results) EXPECT_EQ(y.bytes(), expected);
}

TEST(Workspace, AddressAndContentDoNotMatter) {
  for (const bool causal : {true, false}) {
    Call call(large_case(causal, DType::float32));
    call.forward(), call.backward();
    const auto expected = call.output_bytes();
    for (const int64_t offset : {0, 8, 32, 63}) {
      for (Array* a : {&call.y, &call.dq, &call.dk, &call.dv}) a->poison();
      run(call.forward_params(), 2, offset);
      run(call.backward_params(), 2, offset);
      EXPECT_EQ(call.output_bytes(), expected);
    }
    const int64_t bytes = std::max(latte::workspace_bytes(call.forward_params(), 1),
                                   latte::workspace_bytes(call.backward_params(), 1));
    std::vector<unsigned char> zeros(bytes);
    latte::latent_attention_forward(call.forward_params(), zeros.data(), 1);
    zeros.assign(bytes, 0);
    latte::latent_attention_backward(call.backward_params(), zeros.data(), 1);
    EXPECT_EQ(call.output_bytes(), expected);
  }
}

TEST(Workspace, ForwardDoesNotGrowWithTokens) {
  std::vector<int64_t> bytes;
  for (const int64_t tokens : {64, 4096}) {
    Case c;
    c.tokens = tokens;
    bytes.push_back(latte::workspace_bytes(Call(c).forward_params(), 1));
  }
  EXPECT_EQ(bytes[0], bytes[1]);
}

}  // namespace
}  // namespace testing_latte
