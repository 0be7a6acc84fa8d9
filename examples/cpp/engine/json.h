// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace engine {

/// A JSON value (RFC 8259), as much of it as headers of safetensors files and configurations need.
class Json {
 public:
  enum class Kind { null, boolean, number, string, array, object };

  /// Parses the whole of `text`, blanks around it allowed.
  /// @throws Error with the offset of what is wrong: syntax, a key given twice, more than 16
  /// levels, anything behind the value. Strings are taken byte by byte: their UTF-8 is not checked.
  static Json parse(std::string_view text);

  Kind kind() const { return kind_; }
  bool is_null() const { return kind_ == Kind::null; }

  /// The value, if it is of that kind. @throws Error otherwise, or if a number is not an int64.
  bool boolean() const;
  int64_t integer() const;
  double number() const;
  const std::string& string() const;
  const std::vector<Json>& array() const;
  const std::map<std::string, Json>& object() const;

  /// The member of an object. @throws Error if there is none of that name.
  const Json& at(const std::string& key) const;

 private:
  friend class JsonParser;

  void expect(Kind kind) const;

  Kind kind_ = Kind::null;
  bool boolean_ = false;
  std::string text_;  // of a string, or a number's digits
  std::vector<Json> array_;
  std::map<std::string, Json> object_;
};

/// `text` as a JSON string, quotes included.
std::string json_quoted(std::string_view text);

}  // namespace engine
