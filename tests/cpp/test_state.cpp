// SPDX-License-Identifier: Apache-2.0
// The state: decoding, merge algebra, and what must not change a result.
#include <gtest/gtest.h>

#include "problem.h"

namespace testing_latte {
namespace {

void expect_same_state(const StateArrays& a, const StateArrays& b, double factor = 60) {
  const DType t = a.mean.dtype();
  expect_close("max", a.max.values(), b.max.values(), t, t, 0);
  expect_close("norm", a.norm.values(), b.norm.values(), t, t, factor);
  expect_close("mean", a.mean.values(), b.mean.values(), t, t, factor);
}

StateArrays like(const StateArrays& s, Layout layout = Layout::contiguous) {
  const int64_t* shape = s.mean.tensor().shape;
  return StateArrays(s.mean.dtype(), shape[0], shape[1], shape[2], shape[3], layout);
}

StateArrays copy_of(const StateArrays& s) {
  StateArrays copy = like(s);
  copy.copy_from(s);
  return copy;
}

void set_empty(StateArrays& s) {
  for (int64_t i = 0; i < s.max.size(); ++i) s.max.set(i, -kInfinity), s.norm.set(i, 0);
  for (int64_t i = 0; i < s.mean.size(); ++i) s.mean.set(i, 0);
}

StateArrays merged(const StateArrays& a, const StateArrays& b, Layout layout = Layout::contiguous) {
  StateArrays out = like(a, layout);
  merge_states({a.state(), b.state(), out.state()});
  EXPECT_TRUE(out.intact());
  return out;
}

std::vector<unsigned char> bytes_of(const StateArrays& s) {
  std::vector<unsigned char> all;
  for (const Array* a : {&s.max, &s.norm, &s.mean}) {
    const auto bytes = a->bytes();
    all.insert(all.end(), bytes.begin(), bytes.end());
  }
  return all;
}

// Feeds a causal call token by token.
void check_steps(const Case& c, Layout layout) {
  SCOPED_TRACE(c.text());
  Call whole(c);
  whole.forward();
  StateArrays state = like(whole.final, layout);
  if (c.initial) {
    state.copy_from(whole.initial);
  } else {
    set_empty(state);
  }
  const auto token = [&](const Array& a, int64_t heads, int64_t t, Array& out) {
    const int64_t width = a.tensor().shape[3];
    for (int64_t row = 0; row < c.batch * heads; ++row)
      for (int64_t i = 0; i < width; ++i)
        out.set(row * width + i, a.get((row * c.tokens + t) * width + i));
  };
  for (int64_t t = 0; t < c.tokens; ++t) {
    Array q(c.q_type, {c.batch, c.heads, c.latents}, layout);
    Array k(c.k_type, {c.batch, c.kv_heads, c.latents}, layout);
    Array v(c.v_type, {c.batch, c.kv_heads, c.dim}, layout);
    Array y(c.v_type, {c.batch, c.heads, c.dim}, layout);
    Array expected(c.v_type, {c.batch, c.heads, c.dim});
    token(whole.q, c.heads, t, q);
    token(whole.k, c.kv_heads, t, k);
    token(whole.v, c.kv_heads, t, v);
    token(whole.y, c.heads, t, expected);
    latte::LatentAttentionStep step;
    step.q = q.tensor(), step.k = k.tensor(), step.v = v.tensor(), step.y = y.tensor();
    step.state = state.state(), step.scale = c.scale;
    run(step, c.threads);
    EXPECT_TRUE(y.intact() && state.intact());
    // Both sides are rounded to the type of y.
    expect_close(
        "y", y.values(), expected.values(), c.v_type, c.compute_type(),
        whole.forward_factor() + 2 * unit_roundoff(c.v_type) / unit_roundoff(c.compute_type()));
  }
  expect_same_state(state, whole.final, whole.forward_factor());
}

TEST(Step, EqualsForward) {
  int i = 0;
  for (const int64_t latents : {1, 8, 10, 33})
    for (const int64_t dim : {1, 7, 16, 65})
      for (const Keys keys : {Keys::normal, Keys::rising, Keys::jumps, Keys::infinite}) {
        Case c;
        c.batch = 2, c.heads = 4, c.kv_heads = i % 3 ? 2 : 4, c.tokens = 19;
        c.latents = latents, c.dim = dim, c.keys = keys, c.initial = i % 2;
        c.scale = i % 5 ? 1 : 0.5, c.threads = 1 + i % 2;
        c.set_type(kTypes[i % 4]);
        check_steps(c, static_cast<Layout>(i++ % 6));
      }
}

TEST(Merge, IsAssociativeAndCommutativeWithIdentity) {
  for (const DType dtype : {DType::float32, DType::float64})
    for (const Keys keys : {Keys::normal, Keys::jumps, Keys::infinite}) {
      std::vector<StateArrays> parts;
      for (unsigned seed = 1; seed <= 3; ++seed) {
        Case c;
        c.batch = 2, c.heads = c.kv_heads = 2, c.tokens = 5, c.latents = 7, c.dim = 9;
        c.keys = keys, c.seed = seed;
        c.set_type(dtype);
        Call call(c);
        call.forward();
        parts.push_back(copy_of(call.final));
      }
      const StateArrays &a = parts[0], &b = parts[1], &c = parts[2];
      expect_same_state(merged(merged(a, b), c), merged(a, merged(b, c)), 8);
      expect_same_state(merged(a, b), merged(b, a), 8);
      StateArrays empty = like(a);
      set_empty(empty);
      EXPECT_EQ(bytes_of(merged(a, empty)), bytes_of(a));
      EXPECT_EQ(bytes_of(merged(empty, a)), bytes_of(a));
      EXPECT_EQ(bytes_of(merged(empty, empty)), bytes_of(empty));

      const auto expected = bytes_of(merged(a, b));
      for (int layout = 1; layout < 6; ++layout)
        EXPECT_EQ(bytes_of(merged(a, b, static_cast<Layout>(layout))), expected);
      const StateArrays left = copy_of(a), right = copy_of(b);
      merge_states({left.state(), b.state(), left.state()});
      EXPECT_EQ(bytes_of(left), expected);
      merge_states({a.state(), right.state(), right.state()});
      EXPECT_EQ(bytes_of(right), expected);
    }
}

// A call on tokens [from, to) of `whole`, with the same data.
Call part_of(const Call& whole, int64_t from, int64_t to, bool initial) {
  Case c = whole.c;
  c.tokens = to - from, c.initial = initial;
  Call part(c);
  const auto cut = [&](const Array& source, Array& target) {
    const int64_t width = target.tensor().shape[3];
    for (int64_t i = 0; i < target.size(); ++i) {
      const int64_t row = i / width;
      target.set(i, source.get((row / c.tokens * whole.c.tokens + from + row % c.tokens) * width +
                               i % width));
    }
  };
  cut(whole.q, part.q), cut(whole.k, part.k), cut(whole.v, part.v);
  return part;
}

TEST(State, SplitAnywhere) {
  for (const Keys keys : {Keys::normal, Keys::rising, Keys::jumps, Keys::infinite})
    for (const DType dtype : {DType::float32, DType::float64})
      for (const int64_t at : {0, 1, 40, 63, 64, 65, 100}) {
        Case c;
        c.batch = 2, c.heads = c.kv_heads = 2, c.tokens = 100, c.latents = 10, c.dim = 17;
        c.keys = keys;
        c.set_type(dtype);
        SCOPED_TRACE(c.text() + " split at " + std::to_string(at));
        Call whole(c);
        whole.forward();
        Call head = part_of(whole, 0, at, false), tail = part_of(whole, at, c.tokens, true),
             alone = part_of(whole, at, c.tokens, false);
        head.forward();
        tail.initial.copy_from(head.final);
        tail.forward();
        alone.forward();
        expect_same_state(tail.final, whole.final);
        expect_same_state(merged(head.final, alone.final), whole.final);
        for (int64_t n = 0; n < c.batch; ++n)
          for (int64_t h = 0; h < c.heads; ++h) {
            std::vector<double> joined = head.rows(head.y, n, h, c.heads);
            for (const double y : tail.rows(tail.y, n, h, c.heads)) joined.push_back(y);
            expect_close("y", joined, whole.rows(whole.y, n, h, c.heads), dtype, dtype, 60);
          }
      }
}

// y, the state and the gradients of one sequence, from a call that may hold several.
std::vector<std::vector<double>> results(const Call& call, int64_t n) {
  std::vector<std::vector<double>> all;
  for (int64_t h = 0; h < call.c.kv_heads; ++h) {
    all.push_back(call.rows(call.y, n, h, call.c.heads));
    all.push_back(call.rows(call.dq, n, h, call.c.heads));
    all.push_back(call.rows(call.dk, n, h, call.c.kv_heads));
    all.push_back(call.rows(call.dv, n, h, call.c.kv_heads));
    for (const Array* a : {&call.final.max, &call.final.norm, &call.final.mean})
      all.push_back(call.slice(*a, n, h));
  }
  return all;
}

// Copies sequence n of `source` into the only sequence of `target`.
void take_sequence(const Call& source, int64_t n, Call& target) {
  const auto take = [&](const Array& from, Array& to, int64_t heads) {
    std::vector<double> rows;
    for (int64_t h = 0; h < source.c.kv_heads; ++h)
      for (const double x : source.rows(from, n, h, heads)) rows.push_back(x);
    for (int64_t i = 0; i < to.size(); ++i) to.set(i, rows[i]);
  };
  take(source.q, target.q, source.c.heads);
  take(source.k, target.k, source.c.kv_heads);
  take(source.v, target.v, source.c.kv_heads);
  take(source.dy, target.dy, source.c.heads);
  const auto take_slices = [&](const Array& from, Array& to) {
    const int64_t count = to.size();
    for (int64_t i = 0; i < count; ++i) to.set(i, from.get(n * count + i));
  };
  take_slices(source.d_final.norm, target.d_final.norm);
  take_slices(source.d_final.mean, target.d_final.mean);
}

TEST(State, PackedAndBatchedEqualAlone) {
  for (const DType dtype : kTypes)
    for (const bool causal : {true, false})
      for (const bool packed : {true, false}) {
        Case c;
        c.heads = 4, c.kv_heads = 2, c.latents = 10, c.dim = 9, c.causal = causal;
        c.set_type(dtype);
        if (packed) {
          c.borders = {0, 3, 3, 70, 134, 200};
          c.tokens = 200;
        } else {
          c.batch = 3, c.tokens = 67;
        }
        SCOPED_TRACE(c.text());
        Call together(c);
        together.forward(), together.backward();
        for (int64_t n = 0; n < c.sequences(); ++n) {
          Case single = c;
          single.batch = 1;
          single.tokens = packed ? c.borders[n + 1] - c.borders[n] : c.tokens;
          single.borders.clear();
          Call alone(single);
          take_sequence(together, n, alone);
          alone.forward(), alone.backward();
          EXPECT_EQ(results(together, n), results(alone, 0)) << "sequence " << n;
        }
      }
}

}  // namespace
}  // namespace testing_latte
