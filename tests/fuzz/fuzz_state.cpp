// SPDX-License-Identifier: Apache-2.0
// Any bytes are a state that goes on, or an Error. Checksums are made right, since whoever can
// write a file can write its checksum.
#include <cstddef>
#include <cstdint>
#include <string>

#include "engine/error.h"
#include "engine/session.h"
#include "fuzz_models.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const engine::Model model(testing_latte::fuzzed_model());
  const auto* const bytes = reinterpret_cast<const std::byte*>(data);
  engine::Session session(model, 1);
  try {
    engine::SafeTensors file = engine::SafeTensors::parse({bytes, bytes + size});
    file.metadata.erase("checksum");
    file.metadata["model"] = model.fingerprint();
    file.metadata["checksum"] = std::to_string(file.checksum());
    session.resume(file);
    session.read({0, 1});
    session.save();
  } catch (const engine::Error&) {
  }
  return 0;
}
