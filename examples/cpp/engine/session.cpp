// SPDX-License-Identifier: Apache-2.0
#include "session.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "error.h"
#include "json.h"

namespace engine {
namespace {

constexpr const char* kStateFormat = "latte_ext.engine.state 1";
// Tokens read at once: many enough for the matrix products, few enough that what is between the
// layers stays in the cache.
constexpr int64_t kChunk = 256;
// Of a file; no sequence that follows can overflow what counts it.
constexpr int64_t kMaxPosition = int64_t{1} << 62;

// visit(name, numbers, shape) for all that a block remembers but its position.
template <class Visit>
void visit_state(BlockState& state, const Config& config, const std::string& prefix, Visit visit) {
  const int64_t heads = config.state_heads(), latents = config.num_latents, dim = config.head_dim;
  if (latents > 0) {
    visit(prefix + "max", state.attention.max, {heads, latents});
    visit(prefix + "norm", state.attention.norm, {heads, latents});
    visit(prefix + "mean", state.attention.mean, {heads, latents, dim});
  }
  if (config.window > 0) {
    visit(prefix + "key", state.attention.key, {config.window, config.kv_heads, dim});
    visit(prefix + "value", state.attention.value, {config.window, config.kv_heads, dim});
  }
  if (config.mixer == Config::Mixer::conv)
    visit(prefix + "inputs", state.mixer.inputs, {config.conv_width - 1, config.embed_dim});
  if (config.mixer == Config::Mixer::rglru)
    visit(prefix + "hidden", state.mixer.hidden, {config.embed_dim});
}

using Shape = std::vector<int64_t>;

std::string prefix_of(size_t block) { return "blocks." + std::to_string(block) + "."; }

const std::string& metadata_of(const SafeTensors& file, const std::string& key) {
  const auto found = file.metadata.find(key);
  if (found == file.metadata.end())
    throw Error("session", "file has no " + json_quoted(key) + ", expected a saved state");
  return found->second;
}

void expect(const char* what, const std::string& got, const std::string& expected) {
  if (got != expected)
    throw Error("session", std::string(what) + " is " + json_quoted(got) + ", expected " +
                               json_quoted(expected));
}

}  // namespace

Session::Session(const Model& model, int threads) : model_(model), call_(threads) {
  if (threads < 1)
    throw Error("session", "threads is " + std::to_string(threads) + ", expected at least 1");
  states_.assign(static_cast<size_t>(model.config_.num_layers), BlockState(model.config_));
}

const std::vector<float>& Session::read(const std::vector<int64_t>& tokens) {
  if (tokens.empty()) throw Error("session", "got no tokens, expected at least one");
  for (const int64_t token : tokens)
    if (token < 0 || token >= model_.config_.vocab_size)
      throw Error("session", "got token " + std::to_string(token) + ", expected 0 to " +
                                 std::to_string(model_.config_.vocab_size - 1));
  const auto count = static_cast<int64_t>(tokens.size());
  for (int64_t begin = 0; begin < count; begin += kChunk)
    read_some(tokens.data() + begin, std::min(kChunk, count - begin), begin + kChunk >= count);
  return logits_;
}

void Session::read_some(const int64_t* tokens, int64_t count, bool last) {
  const int64_t width = model_.config_.embed_dim;
  std::vector<float> x(static_cast<size_t>(count * width));
  for (int64_t t = 0; t < count; ++t)
    std::copy_n(model_.embedding_.begin() + tokens[t] * width, width, x.begin() + t * width);
  for (size_t i = 0; i < states_.size(); ++i) model_.blocks_[i](x.data(), count, states_[i], call_);
  position_ += count;
  if (!last) return;
  std::vector<float> normed(static_cast<size_t>(width));
  model_.norm_(x.data() + (count - 1) * width, 1, normed.data());
  logits_.resize(static_cast<size_t>(model_.config_.vocab_size));
  model_.head_(normed.data(), width, 1, logits_.data(), model_.config_.vocab_size, call_.threads());
}

SafeTensors Session::save() const {
  SafeTensors file;
  const auto store = [&](const std::string& name, const std::vector<float>& data, Shape shape) {
    StoredTensor tensor{"F32", std::move(shape), std::vector<std::byte>(data.size() * 4)};
    if (!data.empty()) std::memcpy(tensor.data.data(), data.data(), tensor.data.size());
    file.tensors[name] = std::move(tensor);
  };
  std::vector<BlockState> states = states_;
  for (size_t i = 0; i < states.size(); ++i)
    visit_state(states[i], model_.config_, prefix_of(i),
                [&](const std::string& name, const std::vector<float>& data, Shape shape) {
                  store(name, data, std::move(shape));
                });
  store("logits", logits_, {static_cast<int64_t>(logits_.size())});
  file.metadata["format"] = kStateFormat;
  file.metadata["model"] = model_.fingerprint();
  file.metadata["position"] = std::to_string(position_);
  file.metadata["checksum"] = std::to_string(file.checksum());
  return file;
}

void Session::resume(SafeTensors file) {
  expect("format", metadata_of(file, "format"), kStateFormat);
  const std::string checksum = metadata_of(file, "checksum");
  file.metadata.erase("checksum");
  expect("checksum", checksum, std::to_string(file.checksum()));
  expect("model", metadata_of(file, "model"), model_.fingerprint());
  const int64_t position = Json::parse(metadata_of(file, "position")).integer();
  if (position < 0 || position > kMaxPosition)
    throw Error("session", "position is " + std::to_string(position) + ", expected 0 to " +
                               std::to_string(kMaxPosition));

  const Config& config = model_.config_;
  std::vector<BlockState> states(states_.size(), BlockState(config));
  for (size_t i = 0; i < states.size(); ++i) {
    visit_state(states[i], config, prefix_of(i),
                [&](const std::string& name, std::vector<float>& data, const Shape& shape) {
                  data = file.take(name, shape);
                });
    states[i].attention.position = position;
    auto& valid = states[i].attention.valid;
    std::fill_n(valid.begin(), std::min(position, config.window), uint8_t{1});
    states[i].mixer.fresh = position == 0;
  }
  std::vector<float> logits = file.take("logits", {position > 0 ? config.vocab_size : 0});
  file.check_all_taken();
  states_ = std::move(states), logits_ = std::move(logits), position_ = position;
}

}  // namespace engine
