// SPDX-License-Identifier: Apache-2.0
#include "safetensors.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>

#include "error.h"
#include "json.h"

namespace engine {
namespace {

static_assert(std::endian::native == std::endian::little, "elements are copied as they are");

constexpr const char* kPart = "safetensors";
// A header of ten thousand tensors has about 1 MB. Parsed, "0,0,0" takes a hundred times its text.
constexpr uint64_t kMaxHeader = 4'000'000;

[[noreturn]] void fail(const std::string& text) { throw Error(kPart, text); }

uint64_t bytes_of(const std::string& dtype) {
  static const std::map<std::string, uint64_t> sizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"U16", 2}, {"I16", 2}, {"F16", 2}, {"BF16", 2},
      {"U32", 4},  {"I32", 4}, {"F32", 4}, {"U64", 8}, {"I64", 8}, {"F64", 8}};
  const auto found = sizes.find(dtype);
  if (found == sizes.end()) fail("dtype is " + json_quoted(dtype) + ", expected F32, BF16, ...");
  return found->second;
}

std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

// Elements times their size, never more than the file can hold.
uint64_t checked_bytes(const std::string& name, const std::string& dtype,
                       const std::vector<int64_t>& shape, uint64_t available) {
  uint64_t bytes = bytes_of(dtype);
  for (const int64_t size : shape) {
    if (size < 0) fail(name + " has shape " + text_of(shape) + ", expected no negative size");
    if (size > 0 && bytes > std::numeric_limits<uint64_t>::max() / static_cast<uint64_t>(size))
      fail(name + " has shape " + text_of(shape) + ", expected a size below 2^64 bytes");
    bytes *= static_cast<uint64_t>(size);
  }
  if (bytes > available)
    fail(name + " has shape " + text_of(shape) + ", expected at most the " +
         std::to_string(available) + " bytes of the file");
  return bytes;
}

struct Range {
  uint64_t begin, end;
};

Range range_of(const std::string& name, const Json& entry, uint64_t payload) {
  const auto& offsets = entry.at("data_offsets").array();
  if (offsets.size() != 2)
    fail(name + " has " + std::to_string(offsets.size()) + " offsets, expected 2");
  const int64_t begin = offsets[0].integer(), end = offsets[1].integer();
  if (begin < 0 || end < begin || static_cast<uint64_t>(end) > payload)
    fail(name + " has the bytes " + std::to_string(begin) + " to " + std::to_string(end) +
         ", expected a range within " + std::to_string(payload));
  return {static_cast<uint64_t>(begin), static_cast<uint64_t>(end)};
}

float from_half(uint16_t code) {
  const int exponent = code >> 10 & 31, mantissa = code & 1023;
  const float sign = code >> 15 ? -1.0f : 1.0f;
  if (exponent == 31)
    return mantissa ? std::numeric_limits<float>::quiet_NaN()
                    : sign * std::numeric_limits<float>::infinity();
  return exponent ? sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25)
                  : sign * std::ldexp(static_cast<float>(mantissa), -24);
}

float from_bfloat16(uint16_t code) { return std::bit_cast<float>(uint32_t{code} << 16); }

template <class From, class Convert>
std::vector<float> converted(const std::vector<std::byte>& data, Convert convert) {
  std::vector<float> out(data.size() / sizeof(From));
  for (size_t i = 0; i < out.size(); ++i) {
    From element;
    std::memcpy(&element, data.data() + i * sizeof(From), sizeof(From));
    out[i] = convert(element);
  }
  return out;
}

// Ranges, in any order, must cover the payload exactly once.
void check_cover(std::vector<Range> ranges, uint64_t payload) {
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  uint64_t covered = 0;
  for (const Range& range : ranges) {
    if (range.begin != covered)
      fail("a tensor begins at byte " + std::to_string(range.begin) + ", expected " +
           std::to_string(covered) + ": no gaps and no overlaps");
    covered = range.end;
  }
  if (covered != payload)
    fail("tensors end at byte " + std::to_string(covered) + ", expected " +
         std::to_string(payload) + ", the end of the file");
}

}  // namespace

SafeTensors SafeTensors::parse(const std::vector<std::byte>& data) {
  uint64_t length = 0;
  if (data.size() < sizeof length)
    fail("file has " + std::to_string(data.size()) + " bytes, expected at least 8");
  std::memcpy(&length, data.data(), sizeof length);
  const uint64_t available = data.size() - sizeof length;
  if (length > available || length > kMaxHeader)
    fail("header has " + std::to_string(length) + " bytes, expected at most " +
         std::to_string(std::min(available, kMaxHeader)));
  const auto* const text = reinterpret_cast<const char*>(data.data()) + sizeof length;
  const Json header = Json::parse({text, static_cast<size_t>(length)});
  const std::byte* const payload = data.data() + sizeof length + length;
  const uint64_t payload_size = available - length;

  SafeTensors file;
  std::vector<Range> ranges;
  for (const auto& [name, entry] : header.object()) {
    if (name == "__metadata__") {
      for (const auto& [key, value] : entry.object()) file.metadata[key] = value.string();
      continue;
    }
    StoredTensor tensor;
    tensor.dtype = entry.at("dtype").string();
    for (const Json& size : entry.at("shape").array()) tensor.shape.push_back(size.integer());
    const Range range = range_of(name, entry, payload_size);
    const uint64_t bytes = checked_bytes(name, tensor.dtype, tensor.shape, payload_size);
    if (bytes != range.end - range.begin)
      fail(name + " has " + std::to_string(range.end - range.begin) + " bytes, expected " +
           std::to_string(bytes) + " as " + tensor.dtype + " " + text_of(tensor.shape));
    ranges.push_back(range);
    file.tensors[name] = std::move(tensor);
  }
  check_cover(ranges, payload_size);
  // Only now that no byte belongs to two tensors, so that they take no more memory than the file.
  size_t i = 0;
  for (auto& [name, tensor] : file.tensors) {
    tensor.data.assign(payload + ranges[i].begin, payload + ranges[i].end);
    ++i;
  }
  return file;
}

SafeTensors SafeTensors::read(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary | std::ios::ate);
  const std::streamoff size = stream ? static_cast<std::streamoff>(stream.tellg()) : -1;
  if (size < 0) fail("cannot open " + path.string() + ", expected a readable file");
  std::vector<std::byte> data(static_cast<size_t>(size));
  stream.seekg(0);
  if (!stream.read(reinterpret_cast<char*>(data.data()), size))
    fail("cannot read " + path.string() + ", expected " + std::to_string(size) + " bytes");
  return parse(data);
}

std::vector<std::byte> SafeTensors::serialise() const {
  std::string header = "{\"__metadata__\":{";
  for (const auto& [key, value] : metadata)
    header += (header.back() == '{' ? "" : ",") + json_quoted(key) + ":" + json_quoted(value);
  header += '}';
  uint64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    std::string shape;
    for (const int64_t size : tensor.shape)
      shape += (shape.empty() ? "" : ",") + std::to_string(size);
    header += "," + json_quoted(name) + ":{\"dtype\":" + json_quoted(tensor.dtype) +
              ",\"shape\":[" + shape + "],\"data_offsets\":[" + std::to_string(offset) + "," +
              std::to_string(offset + tensor.data.size()) + "]}";
    offset += tensor.data.size();
  }
  header += '}';
  header.append((8 - header.size() % 8) % 8, ' ');  // so that elements are aligned in the file

  const uint64_t length = header.size();
  std::vector<std::byte> data(sizeof length + length);
  std::memcpy(data.data(), &length, sizeof length);
  std::memcpy(data.data() + sizeof length, header.data(), header.size());
  for (const auto& [name, tensor] : tensors)
    data.insert(data.end(), tensor.data.begin(), tensor.data.end());
  return data;
}

void SafeTensors::write(const std::filesystem::path& path) const {
  const std::vector<std::byte> data = serialise();
  std::filesystem::path beside = path;
  beside += ".part";
  std::ofstream stream(beside, std::ios::binary);
  stream.write(reinterpret_cast<const char*>(data.data()),
               static_cast<std::streamsize>(data.size()));
  stream.close();
  if (!stream) fail("cannot write " + beside.string() + ", expected a writable folder");
  std::filesystem::rename(beside, path);
}

std::vector<float> SafeTensors::take(const std::string& name, const std::vector<int64_t>& shape) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) fail("file has no tensor " + json_quoted(name) + ", expected one");
  const StoredTensor tensor = std::move(found->second);
  tensors.erase(found);
  if (tensor.shape != shape)
    fail(name + " has shape " + text_of(tensor.shape) + ", expected " + text_of(shape));
  if (tensor.dtype == "F32") return converted<float>(tensor.data, [](float x) { return x; });
  if (tensor.dtype == "F16") return converted<uint16_t>(tensor.data, from_half);
  if (tensor.dtype == "BF16") return converted<uint16_t>(tensor.data, from_bfloat16);
  fail(name + " has dtype " + tensor.dtype + ", expected F32, F16 or BF16");
}

void SafeTensors::check_all_taken() const {
  if (!tensors.empty())
    fail("file has a tensor " + json_quoted(tensors.begin()->first) +
         ", expected none of that name");
}

uint64_t SafeTensors::checksum() const {
  // FNV-1a over words of 8 bytes, each step of which is a bijection.
  uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&](const void* data, size_t size) {
    for (size_t i = 0; i < size; i += sizeof hash) {
      uint64_t word = 0;
      std::memcpy(&word, static_cast<const char*>(data) + i, std::min(sizeof word, size - i));
      hash = (hash ^ word) * 0x100000001b3;
    }
    hash = (hash ^ size) * 0x100000001b3;
  };
  for (const auto& [key, value] : metadata)
    add(key.data(), key.size()), add(value.data(), value.size());
  for (const auto& [name, tensor] : tensors) {
    add(name.data(), name.size());
    add(tensor.dtype.data(), tensor.dtype.size());
    add(tensor.shape.data(), tensor.shape.size() * sizeof(int64_t));
    add(tensor.data.data(), tensor.data.size());
  }
  return hash;
}

}  // namespace engine
