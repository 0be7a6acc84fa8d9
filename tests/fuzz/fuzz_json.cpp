// SPDX-License-Identifier: Apache-2.0
// Any text is JSON or an Error, and a string that was read is read again from what is written.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "engine/error.h"
#include "engine/json.h"

namespace {

void visit(const engine::Json& value) {
  switch (value.kind()) {
    case engine::Json::Kind::string:
      if (engine::Json::parse(engine::json_quoted(value.string())).string() != value.string())
        __builtin_trap();
      break;
    case engine::Json::Kind::number:
      try {
        value.integer();
      } catch (const engine::Error&) {
      }
      try {
        value.number();
      } catch (const engine::Error&) {
      }
      break;
    case engine::Json::Kind::array:
      for (const engine::Json& element : value.array()) visit(element);
      break;
    case engine::Json::Kind::object:
      for (const auto& [key, member] : value.object()) visit(member);
      break;
    case engine::Json::Kind::null:
    case engine::Json::Kind::boolean:
      break;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    visit(engine::Json::parse({reinterpret_cast<const char*>(data), size}));
  } catch (const engine::Error&) {
  }
  return 0;
}
