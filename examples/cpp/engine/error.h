// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>

namespace engine {

/// What every function of the engine throws: the part in brackets, what it got, what it expected.
class Error : public std::runtime_error {
 public:
  Error(const std::string& part, const std::string& text)
      : std::runtime_error("[" + part + "] " + text) {}
};

}  // namespace engine
