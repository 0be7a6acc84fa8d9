// SPDX-License-Identifier: Apache-2.0
// What the engine of examples/cpp reads from disk: every size checked, every damage an Error.
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/json.h"
#include "engine/session.h"
#include "engine_models.h"

namespace {

using engine::Json;
using engine::Model;
using engine::SafeTensors;
using engine::Session;
using testing_latte::all_sizes;
using testing_latte::error_of;
using testing_latte::make_model;
using Bytes = std::vector<std::byte>;

Bytes file_of(const std::string& header, size_t payload, int64_t length = -1) {
  const uint64_t size = length < 0 ? header.size() : static_cast<uint64_t>(length);
  Bytes data(8 + header.size() + payload);
  std::memcpy(data.data(), &size, 8);
  std::memcpy(data.data() + 8, header.data(), header.size());
  return data;
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "{\"a\":{\"dtype\":\"" + dtype + "\",\"shape\":[" + shape + "],\"data_offsets\":[" +
         offsets + "]}}";
}

TEST(JsonText, ReadsWhatTheStandardAllows) {
  const Json json = Json::parse(
      " {\"a\": [1, -2.5e1, true, false, null], \"\\u00e9\\ud83d\\ude00\\n\": \"x\\\"\\\\\"} ");
  EXPECT_EQ(json.at("a").array()[0].integer(), 1);
  EXPECT_EQ(json.at("a").array()[1].number(), -25.0);
  EXPECT_TRUE(json.at("a").array()[2].boolean());
  EXPECT_TRUE(json.at("a").array()[4].is_null());
  EXPECT_EQ(json.at("\xc3\xa9\xf0\x9f\x98\x80\n").string(), "x\"\\");
  EXPECT_EQ(Json::parse("9223372036854775807").integer(), INT64_MAX);
}

TEST(JsonText, WhatIsWrittenIsRead) {
  std::string text;
  for (int c = 0; c < 128; ++c) text.push_back(static_cast<char>(c));
  EXPECT_EQ(Json::parse(engine::json_quoted(text)).string(), text);
}

TEST(JsonText, RefusesTheRest) {
  for (const char* text : {"",
                           "{",
                           "[1,]",
                           "[1 2]",
                           "{\"a\":1,}",
                           "{\"a\" 1}",
                           "{\"a\":1,\"a\":2}",
                           "01",
                           "+1",
                           "1.",
                           ".5",
                           "1e",
                           "-",
                           "nul",
                           "tru",
                           "\"",
                           "\"\\x\"",
                           "\"\\u12\"",
                           "\"\\u12g4\"",
                           "\"\\ud800\"",
                           "\"\\udc00\"",
                           "\"\\ud800\\u0041\"",
                           "\"\n\"",
                           "1 1",
                           "NaN",
                           "'a'",
                           "[[[[[[[[[[[[[[[[[[0"})
    EXPECT_NE(error_of([&] { Json::parse(text); }).find("[json] text is malformed at byte"),
              std::string::npos)
        << text;
  for (const char* text : {"9223372036854775808", "1.5", "1e3", "\"1\""})
    EXPECT_NE(error_of([&] { Json::parse(text).integer(); }), "no error") << text;
}

TEST(SafeTensorsFile, ComesBack) {
  const SafeTensors file = make_model(all_sizes()[3]);
  const SafeTensors back = SafeTensors::parse(file.serialise());
  EXPECT_EQ(back.metadata, file.metadata);
  EXPECT_EQ(back.checksum(), file.checksum());
  ASSERT_EQ(back.tensors.size(), file.tensors.size());
}

TEST(SafeTensorsFile, RefusesSizesThatDoNotFit) {
  const struct {
    Bytes data;
    const char* expected;
  } cases[] = {
      {Bytes(7), "file has 7 bytes"},
      {file_of("{}", 0, 3), "header has 3 bytes, expected at most 2"},
      {file_of("{}", 0, INT64_MAX), "header has 9223372036854775807 bytes"},
      {file_of("[]", 0), "value is an array, expected an object"},
      {file_of("{}", 1), "tensors end at byte 0, expected 1"},
      {file_of(entry("F32", "2", "0,4"), 4), "expected at most the 4 bytes of the file"},
      {file_of(entry("F32", "1", "0,8"), 8), "a has 8 bytes, expected 4"},
      {file_of(entry("F32", "1", "0,8"), 4), "expected a range within 4"},
      {file_of(entry("F32", "1", "4,0"), 4), "expected a range within 4"},
      {file_of(entry("F32", "1", "-4,0"), 4), "expected a range within 4"},
      {file_of(entry("F32", "1", "4,8"), 8), "a tensor begins at byte 4, expected 0"},
      {file_of(entry("F32", "1", "0"), 4), "a has 1 offsets, expected 2"},
      {file_of(entry("F32", "-1", "0,4"), 4), "expected no negative size"},
      {file_of(entry("F32", "1.5", "0,4"), 4), "number is 1.5, expected an integer"},
      {file_of(entry("F32", "4294967296,4294967296", "0,4"), 4), "expected a size below 2^64"},
      {file_of(entry("F32", "9223372036854775807,2", "0,4"), 4), "expected a size below 2^64"},
      {file_of(entry("F33", "1", "0,4"), 4), "dtype is \"F33\""},
      {file_of("{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
               "\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]}}",
               3),
       "a tensor begins at byte 1, expected 2"},
      {file_of("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4), "has no \"data_offsets\""},
      {file_of("{\"__metadata__\":{\"x\":1}}", 0), "value is a number, expected a string"},
  };
  for (const auto& c : cases)
    EXPECT_NE(error_of([&] { SafeTensors::parse(c.data); }).find(c.expected), std::string::npos)
        << c.expected << ", got: " << error_of([&] { SafeTensors::parse(c.data); });
}

TEST(SafeTensorsFile, WidensHalvesExactly) {
  const uint16_t half[] = {0x3c00, 0xc000, 0x0001, 0x7c00, 0x7bff};
  const uint16_t brain[] = {0x3f80, 0xc000, 0x0001, 0xff80, 0x7f7f};
  SafeTensors file;
  for (const auto& [name, codes] : {std::pair{"F16", half}, std::pair{"BF16", brain}}) {
    engine::StoredTensor tensor{name, {5}, Bytes(10)};
    std::memcpy(tensor.data.data(), codes, 10);
    file.tensors[name] = tensor;
  }
  EXPECT_EQ(file.take("F16", {5}), (std::vector<float>{1.0f, -2.0f, 0x1p-24f, INFINITY, 65504.0f}));
  EXPECT_EQ(file.take("BF16", {5}),
            (std::vector<float>{1.0f, -2.0f, 0x1p-133f, -INFINITY, 0x1.fep127f}));
  EXPECT_EQ(error_of([&] { file.take("F16", {5}); }),
            "[safetensors] file has no tensor \"F16\", expected one");
}

TEST(SafeTensorsFile, FilesThatAreNotThere) {
  EXPECT_NE(error_of([] { SafeTensors::read("/nonexistent/x"); }).find("cannot open"),
            std::string::npos);
  EXPECT_NE(error_of([] { SafeTensors{}.write("/nonexistent/x"); }).find("cannot write"),
            std::string::npos);
}

TEST(ModelFile, NeedsEveryTensorAndNoOther) {
  const SafeTensors whole = make_model(all_sizes()[4]);
  for (const auto& [name, tensor] : whole.tensors) {
    SafeTensors file = whole;
    file.tensors.erase(name);
    EXPECT_EQ(error_of([&] { Model{file}; }),
              "[safetensors] file has no tensor \"" + name + "\", expected one");
    file = whole;
    file.tensors[name].shape.push_back(1);
    EXPECT_NE(error_of([&] { Model{file}; }).find(name + " has shape "), std::string::npos);
    file = whole;
    file.tensors[name].dtype = "I32";
    EXPECT_NE(error_of([&] { Model{file}; }).find("has dtype I32, expected F32"),
              std::string::npos);
  }
  SafeTensors file = whole;
  file.tensors["more"] = {"F32", {0}, {}};
  EXPECT_EQ(error_of([&] { Model{file}; }),
            "[safetensors] file has a tensor \"more\", expected none of that name");
}

TEST(ModelFile, RefusesSizesOutOfRange) {
  const auto error_with = [](const std::string& from, const std::string& to) {
    SafeTensors file = make_model(all_sizes()[4]);
    std::string& config = file.metadata["config"];
    config.replace(config.find(from), from.size(), to);
    return error_of([&] { Model{file}; });
  };
  EXPECT_NE(error_with("\"num_heads\": 4", "\"num_heads\": 0").find("num_heads is 0, expected 1"),
            std::string::npos);
  EXPECT_NE(error_with("\"kv_heads\": 4", "\"kv_heads\": 3").find("multiple of 3"),
            std::string::npos);
  EXPECT_NE(error_with("\"window\": 5", "\"window\": 99999999").find("window is 99999999"),
            std::string::npos);
  EXPECT_NE(error_with("\"head_dim\": 6", "\"head_dim\": 3").find("even number to rotate"),
            std::string::npos);
  EXPECT_NE(error_with("\"conv_width\": 4", "\"conv_width\": 9").find("9, expected 1 to 8"),
            std::string::npos);
  EXPECT_NE(error_with("1e4", "-1e4").find("rotary_base is -10000"), std::string::npos);
  EXPECT_NE(error_with("\"rglru\"", "\"lstm\"").find("none or conv or rglru"), std::string::npos);
  EXPECT_NE(error_with("\"num_latents\": 3", "\"num_latents\": 0").find("mixer is given"),
            std::string::npos);
  EXPECT_NE(error_with("\"vocab_size\": 13, ", "").find("no \"vocab_size\""), std::string::npos);
  // Asked for, but not in the file: refused before memory for it is taken.
  EXPECT_NE(error_with("\"vocab_size\": 13", "\"vocab_size\": 1048576").find("embedding.weight"),
            std::string::npos);
}

// Bounded fuzzing, the same cases in every run. A case may load, never crash; under
// -DLATTE_SANITIZE=address,undefined every access is checked.
class Fuzz : public testing::Test {
 protected:
  Bytes damaged(const Bytes& data) {
    Bytes out = data;
    const uint32_t kind = random_() % 4;
    if (kind == 0) out.resize(random_() % (data.size() + 1));
    if (kind == 1) out.insert(out.begin() + random_() % 200, std::byte(random_()));
    if (kind >= 2)
      for (uint32_t i = 0; i < 1 + random_() % 4; ++i) {
        // Mostly within the header, where a byte means something.
        const size_t span = random_() % 4 ? std::min<size_t>(out.size(), 3000) : out.size();
        out[random_() % span] = kind == 2 ? std::byte(random_()) : std::byte('0' + random_() % 10);
      }
    return out;
  }

  std::mt19937 random_{0};
};

TEST_F(Fuzz, ModelFiles) {
  const Bytes whole = make_model(all_sizes()[4]).serialise();
  int loaded = 0, refused = 0;
  for (int i = 0; i < 20000; ++i) {
    const Bytes data = damaged(whole);
    try {
      const Model model(SafeTensors::parse(data));
      if (i % 16 == 0) Session(model, 1).read({0, 1});
      ++loaded;
    } catch (const engine::Error&) {
      ++refused;
    }
  }
  EXPECT_GT(loaded, 100);  // changed weights
  EXPECT_GT(refused, 10000);
}

TEST_F(Fuzz, StatesAreNeverTakenDamaged) {
  const Model model(make_model(all_sizes()[4]));
  Session session(model, 1);
  const std::vector<float> logits = session.read({1, 2, 3});
  const Bytes whole = session.save().serialise();
  for (int i = 0; i < 20000; ++i) {
    const Bytes data = damaged(whole);
    Session other(model, 1);
    // What differs in blanks or in the order of keys only is the same state.
    if (error_of([&] { other.resume(SafeTensors::parse(data)); }) == "no error") {
      ASSERT_EQ(other.save().serialise(), whole);
    }
  }
}

TEST_F(Fuzz, Json) {
  const std::string alphabet = "{}[]\",:0123456789.-+eEtrufalsn\\ud8 \n\x01\xff";
  for (int i = 0; i < 100000; ++i) {
    std::string text;
    for (uint32_t n = random_() % 24; n > 0; --n) text += alphabet[random_() % alphabet.size()];
    error_of([&] { Json::parse(text); });  // anything but an Error ends the test
  }
}

}  // namespace
