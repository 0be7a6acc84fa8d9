// SPDX-License-Identifier: Apache-2.0
// latte-lm: text from a byte-level LatteLM, no Python and no torch. `latte-lm --help` says how.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <ctime>
#include <exception>
#include <filesystem>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/parallel.h"
#include "engine/sampler.h"
#include "engine/session.h"

namespace {

constexpr const char* kHelp =
    "latte-lm MODEL.safetensors [options]\n"
    "  Reads the prompt and writes the bytes that the model continues it with.\n"
    "  --prompt TEXT      what to continue\n"
    "  --tokens N         how many bytes to write (default: 200)\n"
    "  --temperature X    0: always the most likely byte (default); 1: as the model says\n"
    "  --seed N           of the random numbers (default: 0)\n"
    "  --threads N        (default: 1)\n"
    "  --load FILE        go on from a saved state, then read the prompt\n"
    "  --save FILE        save the state after the last byte\n"
    "  --time             also say what the time went into, as shares of this machine's peak\n";

// Vocabulary of a byte-level model: a token is a byte.
constexpr int64_t kBytes = 256;

struct Options {
  std::string model, prompt, load, save;
  int64_t tokens = 200, seed = 0, threads = 1;
  double temperature = 0;
  bool time = false, help = false;
};

template <class Number>
Number number(const std::string& name, const std::string& text, Number least) {
  Number value{};
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc{} || stop != end || !(value >= least))
    throw engine::Error("latte-lm", name + " is '" + text + "', expected a number, at least " +
                                        std::to_string(least));
  return value;
}

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    if (name == "--help" || name == "--time") {
      (name == "--time" ? options.time : options.help) = true;
      continue;
    }
    if (name.rfind("--", 0) != 0) {
      if (!options.model.empty())
        throw engine::Error("latte-lm", "got '" + name + "', expected one model");
      options.model = name;
      continue;
    }
    if (++i == arguments.size())
      throw engine::Error("latte-lm", name + " is the last argument, expected a value behind it");
    const std::string& value = arguments[i];
    if (name == "--prompt")
      options.prompt = value;
    else if (name == "--load")
      options.load = value;
    else if (name == "--save")
      options.save = value;
    else if (name == "--tokens")
      options.tokens = number<int64_t>(name, value, 0);
    else if (name == "--seed")
      options.seed = number<int64_t>(name, value, 0);
    else if (name == "--threads")
      options.threads = number<int64_t>(name, value, 1);
    else if (name == "--temperature")
      options.temperature = number<double>(name, value, 0);
    else
      throw engine::Error("latte-lm", "got " + name + ", expected one of the options of --help");
  }
  return options;
}

// Processor time of all threads: what other processes take does not count.
double seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

// Bytes per second that `threads` threads read from memory, the best of five passes.
double read_rate(int threads) {
  constexpr int64_t kWords = int64_t{1} << 25;  // 256 MB: no cache holds it
  const std::vector<double> data(kWords, 1.0);
  std::vector<double> sums(static_cast<size_t>(threads));
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    const double begin = seconds();
    engine::parallel_for(threads, threads, [&](int64_t t) {
      double sum[32] = {};
      for (int64_t i = t * (kWords / threads); i + 32 <= (t + 1) * (kWords / threads); i += 32)
        for (int64_t lane = 0; lane < 32; ++lane) sum[lane] += data[static_cast<size_t>(i + lane)];
      for (const double lane : sum) sums[static_cast<size_t>(t)] += lane;
    });
    best = std::max(best, static_cast<double>(kWords * 8) * threads / (seconds() - begin));
  }
  return sums[0] > 0 ? best : 0;  // which also uses the sums
}

// What a token must at least do, against what the machine can: `multiply_adds` weights each.
void report(const engine::Model& model, int64_t prompt, double prompt_time, int64_t generated,
            double generated_time, int threads) {
  const auto bytes = static_cast<double>(model.weight_bytes());
  if (prompt > 0)
    std::fprintf(stderr, "prompt: %.0f %% of the multiply-add peak\n",
                 100 * bytes / 2 * static_cast<double>(prompt) / prompt_time /
                     latte::fma_rate(threads, 0.3));
  if (generated > 0)
    std::fprintf(stderr, "a token: %.0f %% of the memory bandwidth, %.2f MB of weights\n",
                 100 * bytes * static_cast<double>(generated) / generated_time / read_rate(threads),
                 bytes / 1e6);
}

std::vector<int64_t> tokens_of(const std::string& text) {
  std::vector<int64_t> tokens;
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

int run(const Options& options) {
  if (options.help || options.model.empty()) {
    std::fputs(kHelp, options.help ? stdout : stderr);
    return options.help ? 0 : 2;
  }
  const engine::Model model = engine::Model::load(options.model);
  if (model.config().vocab_size != kBytes)
    throw engine::Error("latte-lm", "model has " + std::to_string(model.config().vocab_size) +
                                        " tokens, expected 256: a model of bytes");
  const auto threads = static_cast<int>(std::min<int64_t>(options.threads, 1024));
  engine::Session session(model, threads);
  engine::Sampler sample(options.temperature, static_cast<uint64_t>(options.seed));
  if (!options.load.empty()) session.resume(engine::SafeTensors::read(options.load));
  const double start = seconds();
  if (!options.prompt.empty()) session.read(tokens_of(options.prompt));
  if (options.tokens > 0 && session.position() == 0)
    throw engine::Error("latte-lm", "prompt is empty, expected --prompt or --load");
  const double begin = seconds();
  for (int64_t i = 0; i < options.tokens; ++i) {
    const int64_t token = sample(session.logits());
    std::fputc(static_cast<int>(token), stdout);
    std::fflush(stdout);
    session.read({token});
  }
  const double end = seconds();
  if (!options.save.empty()) session.save().write(options.save);
  if (options.time)
    report(model, static_cast<int64_t>(options.prompt.size()), (begin - start) / threads,
           options.tokens, (end - begin) / threads, threads);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(parse({argv + 1, argv + argc}));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
