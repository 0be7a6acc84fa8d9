// SPDX-License-Identifier: Apache-2.0
// Any bytes are a model that runs, or an Error.
#include <cstddef>
#include <cstdint>

#include "engine/error.h"
#include "engine/session.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto* const bytes = reinterpret_cast<const std::byte*>(data);
  try {
    const engine::Model model(engine::SafeTensors::parse({bytes, bytes + size}));
    engine::Session session(model, 1);
    session.read({0});
    session.read({0, 0, 0});
  } catch (const engine::Error&) {
  }
  return 0;
}
