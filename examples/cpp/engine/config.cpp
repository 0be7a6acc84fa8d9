// SPDX-License-Identifier: Apache-2.0
#include "config.h"

#include <array>
#include <numeric>

#include "error.h"

namespace engine {
namespace {

// Products of three sizes stay below 2^63, and no model is that large.
constexpr int64_t kMaxSize = 1 << 20;

[[noreturn]] void fail(const std::string& name, const std::string& got,
                       const std::string& expected) {
  throw Error("config", name + " is " + got + ", expected " + expected);
}

int64_t size_of(const Json& json, const std::string& name, int64_t least, int64_t most = kMaxSize) {
  const int64_t size = json.at(name).integer();
  if (size < least || size > most)
    fail(name, std::to_string(size), std::to_string(least) + " to " + std::to_string(most));
  return size;
}

int64_t size_or(const Json& json, const std::string& name, int64_t otherwise) {
  return json.at(name).is_null() ? otherwise : size_of(json, name, 1);
}

template <class Kind, size_t n>
Kind part(const Json& json, const std::string& name, const std::array<const char*, n>& kinds) {
  const std::string& got = json.at(name).string();
  std::string expected;
  for (size_t i = 0; i < n; ++i) {
    if (got == kinds[i]) return static_cast<Kind>(i);
    expected += (i ? " or " : "") + std::string(kinds[i]);
  }
  fail(name, json_quoted(got), expected);
}

void check(const Config& config) {
  for (const int64_t heads : {config.kv_heads, config.latent_heads})
    if (config.num_heads % heads)
      fail("num_heads", std::to_string(config.num_heads),
           "a multiple of " + std::to_string(heads) + " heads of keys");
  if (config.window == 0 && config.num_latents == 0)
    fail("window", "0 with num_latents = 0", "one of them positive");
  if (config.window > 0 && config.rotary_base && config.head_dim % 2)
    fail("head_dim", std::to_string(config.head_dim), "an even number to rotate");
  if (config.rotary_base && !(*config.rotary_base > 0))
    fail("rotary_base", std::to_string(*config.rotary_base), "a positive number");
  if (config.mixer == Config::Mixer::rglru && config.embed_dim % config.num_heads)
    fail("embed_dim", std::to_string(config.embed_dim),
         "a multiple of num_heads = " + std::to_string(config.num_heads));
  if (config.mixer != Config::Mixer::none && config.num_latents == 0)
    fail("mixer", "given with num_latents = 0", "none");
}

}  // namespace

Config Config::parse(const Json& json) {
  Config config;
  config.vocab_size = size_of(json, "vocab_size", 1);
  config.embed_dim = size_of(json, "embed_dim", 1);
  config.num_layers = size_of(json, "num_layers", 1);
  config.num_heads = size_of(json, "num_heads", 1);
  config.num_latents = size_of(json, "num_latents", 0);
  config.window = size_of(json, "window", 0);
  config.conv_width = size_of(json, "conv_width", 1, 8);
  config.kv_heads = size_or(json, "kv_heads", config.num_heads);
  config.latent_heads = size_or(json, "latent_heads", config.kv_heads);
  if (json.at("head_dim").is_null() && config.embed_dim % config.num_heads)
    fail("embed_dim", std::to_string(config.embed_dim),
         "a multiple of num_heads = " + std::to_string(config.num_heads));
  config.head_dim = size_or(json, "head_dim", config.embed_dim / config.num_heads);
  if (!json.at("rotary_base").is_null()) config.rotary_base = json.at("rotary_base").number();
  config.mixer = part<Mixer, 3>(json, "mixer", {"none", "conv", "rglru"});
  config.norm = part<Norm, 2>(json, "norm", {"layer", "rms"});
  config.mlp = part<Mlp, 2>(json, "mlp", {"gelu", "silu"});
  const int64_t width = config.embed_dim;
  config.mlp_dim =
      size_or(json, "mlp_dim", config.mlp == Mlp::gelu ? 4 * width : (width + 2) / 3 * 8);
  config.bias = json.at("bias").boolean();
  config.tie_head = json.at("tie_head").boolean();
  check(config);
  return config;
}

int64_t Config::state_heads() const { return std::lcm(latent_heads, kv_heads); }

}  // namespace engine
