// SPDX-License-Identifier: Apache-2.0
// fuzz_seeds FOLDER: writes what the fuzzers begin with, FOLDER/json, /model and /state.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

#include "engine/session.h"
#include "fuzz_models.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: fuzz_seeds FOLDER\n");
    return 2;
  }
  const std::filesystem::path folder = argv[1];
  for (const char* what : {"json", "model", "state"})
    std::filesystem::create_directories(folder / what);

  const auto sizes = testing_latte::fuzzed_sizes();
  for (size_t i = 0; i < sizes.size(); ++i) {
    const std::string name = "seed" + std::to_string(i);
    testing_latte::make_model(sizes[i]).write(folder / "model" / name);
    std::ofstream(folder / "json" / name) << testing_latte::config_text(sizes[i]);
  }
  std::ofstream(folder / "json" / "numbers")
      << "[0, -1, 1.5e-3, 9223372036854775807, true, false, null, \"\\u00e9\\ud83d\\ude00\\n\"]";

  const engine::Model model(testing_latte::fuzzed_model());
  engine::Session session(model, 1);
  session.save().write(folder / "state" / "empty");
  session.read({0, 1, 2});
  session.save().write(folder / "state" / "three");
  return 0;
}
