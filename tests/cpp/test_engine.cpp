// SPDX-License-Identifier: Apache-2.0
// The engine of examples/cpp: a sequence in any pieces is one sequence, saved or not.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include "engine/linear.h"
#include "engine/sampler.h"
#include "engine/session.h"
#include "engine_models.h"

namespace {

using engine::Model;
using engine::SafeTensors;
using engine::Session;
using testing_latte::all_sizes;
using testing_latte::error_of;
using testing_latte::make_model;

std::vector<int64_t> some_tokens(int64_t count, int64_t vocab) {
  std::vector<int64_t> tokens;
  for (int64_t t = 0; t < count; ++t) tokens.push_back((t * t + 3 * t) % vocab);
  return tokens;
}

void expect_near(const std::vector<float>& got, const std::vector<float>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], want[i], 2e-4) << "logit " << i;
}

TEST(Linear, EveryRemainderOfRowsAndOutputsEqualsTheSum) {
  for (const int64_t outputs : {1, 31, 32, 33, 64, 65, 200})
    for (const int64_t rows : {1, 5, 6, 7, 13})
      for (const bool accumulate : {false, true}) {
        const int64_t inputs = 9, x_stride = 11, y_stride = outputs + 3;
        std::vector<float> weight, bias, x, y(static_cast<size_t>(rows * y_stride), 2.0f);
        for (int64_t i = 0; i < outputs * inputs; ++i) weight.push_back(std::sin(1.0f * i));
        for (int64_t i = 0; i < outputs; ++i) bias.push_back(0.01f * i);
        for (int64_t i = 0; i < rows * x_stride; ++i) x.push_back(std::cos(3.0f * i));
        engine::Linear layer(inputs, outputs);
        layer.set(0, weight, bias);
        layer(x.data(), x_stride, rows, y.data(), y_stride, 2, accumulate);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t o = 0; o < y_stride; ++o) {
            double want = o < outputs && !accumulate ? 0 : 2;
            if (o < outputs) want += bias[static_cast<size_t>(o)];
            for (int64_t i = 0; o < outputs && i < inputs; ++i)
              want += static_cast<double>(weight[static_cast<size_t>(o * inputs + i)]) *
                      x[static_cast<size_t>(r * x_stride + i)];
            ASSERT_NEAR(y[static_cast<size_t>(r * y_stride + o)], want, 1e-5)
                << outputs << " outputs, row " << r << ", output " << o;
          }
      }
}

// T1 of the library, for the whole model; 300 tokens are more than one chunk and many windows.
TEST(Session, WholeEqualsPiecesEqualsTokenByToken) {
  for (const auto& sizes : all_sizes()) {
    SCOPED_TRACE(testing_latte::config_text(sizes));
    const Model model(make_model(sizes));
    const std::vector<int64_t> tokens = some_tokens(300, sizes.vocab);
    Session whole(model, 2), pieces(model, 1), steps(model, 1);
    whole.read(tokens);
    pieces.read({tokens.begin(), tokens.begin() + 3});
    pieces.read({tokens.begin() + 3, tokens.begin() + 20});
    pieces.read({tokens.begin() + 20, tokens.end()});
    for (const int64_t token : tokens) steps.read({token});
    EXPECT_EQ(whole.position(), 300);
    expect_near(pieces.logits(), whole.logits());
    expect_near(steps.logits(), whole.logits());
  }
}

TEST(Session, GoesOnWithTheSameBitsAfterAFile) {
  const auto path = std::filesystem::path(testing::TempDir()) / "latte_engine_state.safetensors";
  for (const auto& sizes : all_sizes()) {
    SCOPED_TRACE(testing_latte::config_text(sizes));
    const Model model(make_model(sizes));
    for (const int64_t count : {0, 1, 4, 40}) {
      Session original(model, 1), resumed(model, 1);
      if (count > 0) original.read(some_tokens(count, sizes.vocab));
      original.save().write(path);
      resumed.read({1, 2});  // what it was does not matter
      resumed.resume(SafeTensors::read(path));
      EXPECT_EQ(resumed.position(), count);
      EXPECT_EQ(resumed.logits(), original.logits());
      for (const int64_t token : {5, 7, 0})
        EXPECT_EQ(resumed.read({token}), original.read({token}));
    }
  }
  std::filesystem::remove(path);
}

TEST(Session, DistinguishesModelsAndStates) {
  const auto sizes = all_sizes();
  const Model model(make_model(sizes[3])), other(make_model(sizes[3], 1));
  Session session(model, 1), stranger(other, 1);
  const std::vector<float> before = session.read({1, 2, 3});
  EXPECT_EQ(error_of([&] { stranger.resume(session.save()); }),
            "[session] model is \"" + model.fingerprint() + "\", expected \"" +
                other.fingerprint() + "\"");
  EXPECT_EQ(error_of([&] { session.resume(make_model(sizes[3])); }),
            "[session] format is \"latte_ext.LatteLM 1\", expected \"latte_ext.engine.state 1\"");
  EXPECT_EQ(error_of([&] { Model(session.save()); }),
            "[model] file has the format \"latte_ext.engine.state 1\", expected "
            "\"latte_ext.LatteLM 1\"");
  EXPECT_EQ(session.logits(), before);
}

// A checksum is no signature: what it covers is still checked.
TEST(Session, RefusesPositionsThatCouldOverflow) {
  const Model model(make_model(all_sizes()[4]));
  Session session(model, 1);
  session.read({1, 2, 3});
  const auto error_at = [&](const std::string& position) {
    engine::SafeTensors file = session.save();
    file.metadata.erase("checksum");
    file.metadata["position"] = position;
    file.metadata["checksum"] = std::to_string(file.checksum());
    return error_of([&] { session.resume(file); });
  };
  EXPECT_EQ(error_at("4611686018427387904"), "no error");
  for (const char* position : {"-1", "4611686018427387905", "9223372036854775807"})
    EXPECT_EQ(error_at(position), "[session] position is " + std::string(position) +
                                      ", expected 0 to 4611686018427387904");
}

TEST(Session, RefusesWhatIsNoToken) {
  const Model model(make_model(all_sizes()[0]));
  Session session(model, 1);
  EXPECT_EQ(error_of([&] { session.read({}); }), "[session] got no tokens, expected at least one");
  EXPECT_EQ(error_of([&] { session.read({1, 13}); }), "[session] got token 13, expected 0 to 12");
  EXPECT_EQ(error_of([&] { session.read({-1}); }), "[session] got token -1, expected 0 to 12");
  EXPECT_EQ(session.position(), 0);
  EXPECT_EQ(error_of([&] { Session(model, 0); }), "[session] threads is 0, expected at least 1");
}

TEST(Sampler, FollowsTheLogits) {
  const std::vector<float> logits = {0.0f, std::log(3.0f), -INFINITY};
  engine::Sampler greedy(0, 0), sample(1, 0), again(1, 0);
  int64_t ones = 0;
  for (int i = 0; i < 4000; ++i) {
    EXPECT_EQ(greedy(logits), 1);
    const int64_t token = sample(logits);
    EXPECT_EQ(token, again(logits));
    EXPECT_LT(token, 2);
    ones += token;
  }
  EXPECT_NEAR(static_cast<double>(ones) / 4000, 0.75, 0.05);
  EXPECT_NE(error_of([] { engine::Sampler(-1, 0); }), "no error");
  EXPECT_NE(error_of([] { engine::Sampler(NAN, 0); }), "no error");
}

}  // namespace
