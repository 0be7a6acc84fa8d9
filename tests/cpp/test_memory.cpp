// SPDX-License-Identifier: Apache-2.0
// The library allocates nothing, uses exactly the workspace it asked for and reaches far offsets.
// That nothing else is written and every output is, harness.h checks in every call of every suite.
#include <sys/mman.h>

#include "harness.h"

using namespace latte_test;  // NOLINT(google-build-using-namespace)

namespace latte_test {
int64_t allocation_count();  // main.cpp
}

namespace {

template <class Run>
int64_t allocations_of(Run run) {
  run();  // OpenMP's team and the choice of kernels are made once
  const int64_t before = latte_test::allocation_count();
  run();
  return latte_test::allocation_count() - before;
}

}  // namespace

TEST_SUITE_BEGIN("memory");

TEST_CASE("the counter counts") {
  std::vector<std::vector<int>> kept;
  CHECK(allocations_of([&] { kept.emplace_back(10); }) > 0);
}

TEST_CASE("a call allocates nothing") {
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    for (const bool causal : {true, false}) {
      for (const int threads : {1, 2}) {
        for (const Layout layout : {Layout::contiguous, Layout::gaps}) {
          const Case c{.heads = 4,
                       .tokens = 150,
                       .latents = 33,
                       .dim = 65,
                       .causal = causal,
                       .keys = Keys::jumps,
                       .masked = true,
                       .cu_seqlens = {0, 70, 150},
                       .with_initial = causal,
                       .q = dtype,
                       .k = dtype,
                       .v = dtype,
                       .layout = layout};
          Call call(make_problem(c), c);
          Workspace forward(latte::workspace_bytes(call.forward, threads));
          Workspace backward(latte::workspace_bytes(call.backward, threads));
          INFO(c.text(), " threads ", threads);
          CHECK(allocations_of([&] { latte::workspace_bytes(call.forward, threads); }) == 0);
          CHECK(allocations_of([&] { latte::workspace_bytes(call.backward, threads); }) == 0);
          CHECK(allocations_of([&] {
                  latte::latent_attention_forward(call.forward, forward.data(), threads);
                }) == 0);
          CHECK(allocations_of([&] {
                  latte::latent_attention_backward(call.backward, backward.data(), threads);
                }) == 0);
        }
      }
    }
  }
}

TEST_CASE("a step and a merge allocate nothing") {
  for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    const DType compute = dtype == DType::float64 ? dtype : DType::float32;
    Buffer q(dtype, {2, 4, 33}), k(dtype, {2, 2, 33}), v(dtype, {2, 2, 65}), y(dtype, {2, 4, 65});
    q.fill(Doubles(q.count(), 0.5));
    k.fill(Doubles(k.count(), 0.5));
    v.fill(Doubles(v.count(), 0.5));
    StateBuffers state(compute, 2, 2, 33, 65, Layout::contiguous);
    state.fill({Doubles(132, 0.0), Doubles(132, 1.0), Doubles(132 * 65, 1.0)});
    latte::LatentAttentionStep step{q.tensor(), k.tensor(), v.tensor(), state.state(), y.tensor()};
    Workspace workspace(latte::workspace_bytes(step, 2));
    INFO(name(dtype));
    CHECK(allocations_of([&] { latte::latent_attention_step(step, workspace.data(), 2); }) == 0);
    const latte::StateMerge merge{state.state(), state.state(), state.state()};
    CHECK(allocations_of([&] { latte::state_merge(merge); }) == 0);
  }
}

TEST_CASE("the workspace may stand anywhere and is exact") {
  for (const DType dtype : {DType::float32, DType::float64, DType::float16}) {
    for (const bool causal : {true, false}) {
      const Case c{.batch = 2,
                   .heads = 4,
                   .kv_heads = 2,
                   .tokens = 130,
                   .latents = 17,
                   .dim = 33,
                   .causal = causal,
                   .keys = Keys::jumps,
                   .masked = true,
                   .with_initial = causal,
                   .q = dtype,
                   .k = dtype,
                   .v = dtype,
                   .layout = Layout::gaps};
      const Problem p = make_problem(c);
      Outputs first;
      for (int64_t misalignment = 0; misalignment < 64; misalignment += misalignment < 4 ? 1 : 5) {
        for (const int threads : {1, 2, 5}) {
          Call call(p, c);
          call.run_forward(threads, misalignment);  // checks the guards
          call.run_backward(threads, misalignment);
          if (misalignment == 0 && threads == 1) first = call.outputs();
          CHECK(call.outputs() == first);
        }
      }
    }
  }
}

TEST_CASE("the workspace does not grow with the batch") {
  Case c{.heads = 2, .tokens = 100, .latents = 16, .dim = 16};
  int64_t forward = 0, backward = 0;
  for (const int64_t batch : {1, 2, 16}) {
    c.batch = batch;
    Call call(make_problem(c), c);
    if (batch == 1) {
      forward = latte::workspace_bytes(call.forward, 1);
      backward = latte::workspace_bytes(call.backward, 1);
    }
    CHECK(latte::workspace_bytes(call.forward, 1) == forward);
    CHECK(latte::workspace_bytes(call.backward, 1) == backward);
  }
}

TEST_CASE("offsets beyond 2^31 elements") {
  // Two batch rows 2^31 + 7 elements apart in address space that is reserved, not filled.
  constexpr int64_t kFar = (int64_t{1} << 31) + 7;
  const Case c{.batch = 2, .heads = 1, .kv_heads = 1, .tokens = 70, .latents = 16, .dim = 16};
  const Problem p = make_problem(c);
  const int64_t row = p.tokens * p.latents;
  const size_t bytes = static_cast<size_t>(kFar + row) * sizeof(float);
  std::vector<float*> regions;
  for (int i = 0; i < 8; ++i) {
    void* region = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    REQUIRE(region != MAP_FAILED);
    regions.push_back(static_cast<float*>(region));
  }
  const auto far = [&](int i, latte::Tensor t, const Doubles* values) {
    t.data = regions[i];
    t.stride[0] = kFar;
    for (int64_t b = 0; values && b < 2; ++b)
      for (int64_t j = 0; j < row; ++j)
        regions[i][b * kFar + j] = static_cast<float>((*values)[b * row + j]);
    return t;
  };
  const auto near = [&](int i) {
    Doubles values;
    for (int64_t b = 0; b < 2; ++b)
      values.insert(values.end(), regions[i] + b * kFar, regions[i] + b * kFar + row);
    return values;
  };
  Call call(p, c);
  call.run_forward(1);
  call.run_backward(1);
  const Outputs expected = call.outputs();
  call.forward.q = call.backward.q = far(0, call.forward.q, &p.q);
  call.forward.k = call.backward.k = far(1, call.forward.k, &p.k);
  call.forward.v = call.backward.v = far(2, call.forward.v, &p.v);
  call.backward.dy = far(3, call.backward.dy, &p.dy);
  call.forward.y = far(4, call.forward.y, nullptr);
  call.backward.dq = far(5, call.backward.dq, nullptr);
  call.backward.dk = far(6, call.backward.dk, nullptr);
  call.backward.dv = far(7, call.backward.dv, nullptr);
  call.run_forward(1);
  call.run_backward(1);
  CHECK(near(4) == expected.y);
  CHECK(near(5) == expected.dq);
  CHECK(near(6) == expected.dk);
  CHECK(near(7) == expected.dv);
  for (float* region : regions) munmap(region, bytes);
}

TEST_SUITE_END();
