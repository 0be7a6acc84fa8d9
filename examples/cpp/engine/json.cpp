// SPDX-License-Identifier: Apache-2.0
#include "json.h"

#include <charconv>
#include <locale>
#include <sstream>

#include "error.h"

namespace engine {
namespace {

constexpr int kMaxDepth = 16;
constexpr const char* kKinds[] = {"null",     "a boolean", "a number",
                                  "a string", "an array",  "an object"};

bool is_digit(char c) { return c >= '0' && c <= '9'; }

void append_utf8(std::string& out, uint32_t code) {
  const auto add = [&](uint32_t bits) { out.push_back(static_cast<char>(bits)); };
  if (code < 0x80) {
    add(code);
  } else if (code < 0x800) {
    add(0xC0 | code >> 6), add(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    add(0xE0 | code >> 12), add(0x80 | (code >> 6 & 0x3F)), add(0x80 | (code & 0x3F));
  } else {
    add(0xF0 | code >> 18), add(0x80 | (code >> 12 & 0x3F)), add(0x80 | (code >> 6 & 0x3F)),
        add(0x80 | (code & 0x3F));
  }
}

}  // namespace

class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = parse_value(0);
    skip_blanks();
    if (at_ != text_.size()) fail("the end");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& expected) const {
    throw Error("json",
                "text is malformed at byte " + std::to_string(at_) + ", expected " + expected);
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(char c) {
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void need(char c) {
    if (!take(c)) fail(std::string("'") + c + "'");
  }

  void skip_blanks() {
    while (take(' ') || take('\n') || take('\r') || take('\t')) {
    }
  }

  Json parse_value(int depth) {
    if (depth > kMaxDepth) fail("at most " + std::to_string(kMaxDepth) + " levels");
    skip_blanks();
    Json value;
    switch (peek()) {
      case '{':
        parse_object(value, depth);
        break;
      case '[':
        parse_array(value, depth);
        break;
      case '"':
        value.kind_ = Json::Kind::string;
        value.text_ = parse_string();
        break;
      case 't':
      case 'f':
        value.kind_ = Json::Kind::boolean;
        value.boolean_ = peek() == 't';
        parse_word(value.boolean_ ? "true" : "false");
        break;
      case 'n':
        parse_word("null");
        break;
      default:
        value.kind_ = Json::Kind::number;
        value.text_ = parse_number();
    }
    return value;
  }

  void parse_object(Json& value, int depth) {
    value.kind_ = Json::Kind::object;
    need('{');
    skip_blanks();
    if (take('}')) return;
    do {
      skip_blanks();
      std::string key = parse_string();
      skip_blanks();
      need(':');
      if (!value.object_.try_emplace(key, parse_value(depth + 1)).second)
        fail("every key once, got " + json_quoted(key) + " twice");
      skip_blanks();
    } while (take(','));
    need('}');
  }

  void parse_array(Json& value, int depth) {
    value.kind_ = Json::Kind::array;
    need('[');
    skip_blanks();
    if (take(']')) return;
    do {
      value.array_.push_back(parse_value(depth + 1));
      skip_blanks();
    } while (take(','));
    need(']');
  }

  void parse_word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) fail(std::string(word));
    at_ += word.size();
  }

  std::string parse_number() {
    const size_t begin = at_;
    take('-');
    if (!take('0')) digits();
    if (take('.')) digits();
    if (take('e') || take('E')) {
      if (!take('+')) take('-');
      digits();
    }
    return std::string(text_.substr(begin, at_ - begin));
  }

  void digits() {
    if (!is_digit(peek())) fail("a value");
    while (is_digit(peek())) ++at_;
  }

  std::string parse_string() {
    std::string out;
    need('"');
    while (!take('"')) {
      if (at_ == text_.size() || static_cast<unsigned char>(text_[at_]) < 0x20)
        fail("a character of a string");
      if (take('\\'))
        parse_escape(out);
      else
        out.push_back(text_[at_++]);
    }
    return out;
  }

  void parse_escape(std::string& out) {
    static constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    if (take('u')) {
      uint32_t code = parse_hex();
      if (code >= 0xD800 && code < 0xDC00) {  // the first half of a surrogate pair
        parse_word("\\u");
        const uint32_t low = parse_hex();
        if (low < 0xDC00 || low >= 0xE000) fail("the second half of a surrogate pair");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
      } else if (code >= 0xDC00 && code < 0xE000) {
        fail("the first half of a surrogate pair");
      }
      append_utf8(out, code);
      return;
    }
    const size_t index = at_ < text_.size() ? kNames.find(text_[at_]) : std::string_view::npos;
    if (index == std::string_view::npos) fail("an escape sequence");
    ++at_;
    out.push_back(kMeanings[index]);
  }

  uint32_t parse_hex() {
    const std::string_view four = text_.substr(at_, 4);
    uint32_t code = 0;
    const auto [end, error] = std::from_chars(four.data(), four.data() + four.size(), code, 16);
    if (four.size() != 4 || error != std::errc{} || end != four.data() + 4)
      fail("four hexadecimal digits");
    at_ += 4;
    return code;
  }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonParser(text).document(); }

void Json::expect(Kind kind) const {
  if (kind_ != kind)
    throw Error("json", std::string("value is ") + kKinds[static_cast<int>(kind_)] + ", expected " +
                            kKinds[static_cast<int>(kind)]);
}

bool Json::boolean() const {
  expect(Kind::boolean);
  return boolean_;
}

int64_t Json::integer() const {
  expect(Kind::number);
  int64_t value = 0;
  const char* const end = text_.data() + text_.size();
  const auto [stop, error] = std::from_chars(text_.data(), end, value);
  if (error != std::errc{} || stop != end)
    throw Error("json", "number is " + text_ + ", expected an integer of 64 bits");
  return value;
}

double Json::number() const {
  expect(Kind::number);
  // Not strtod, which reads "1.5" as 1 where the locale has a decimal comma.
  std::istringstream stream(text_);
  stream.imbue(std::locale::classic());
  double value = 0;
  if (!(stream >> value)) throw Error("json", "number is " + text_ + ", expected a double");
  return value;
}

const std::string& Json::string() const {
  expect(Kind::string);
  return text_;
}

const std::vector<Json>& Json::array() const {
  expect(Kind::array);
  return array_;
}

const std::map<std::string, Json>& Json::object() const {
  expect(Kind::object);
  return object_;
}

const Json& Json::at(const std::string& key) const {
  const auto found = object().find(key);
  if (found == object_.end())
    throw Error("json", "object has no " + json_quoted(key) + ", expected one");
  return found->second;
}

std::string json_quoted(std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += {'\\', c};
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += "\\u00";
      out += {kHex[c >> 4], kHex[c & 15]};
    } else {
      out.push_back(c);
    }
  }
  return out + "\"";
}

}  // namespace engine
