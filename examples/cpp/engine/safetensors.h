// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace engine {

/// A tensor of a file: contiguous little-endian elements, the last dimension fastest.
struct StoredTensor {
  std::string dtype;           ///< as the file names it: "F32", "BF16", "BOOL", "I64", ...
  std::vector<int64_t> shape;  ///< no dimension: one element
  std::vector<std::byte> data;
};

/// The contents of a safetensors file: names, shapes and numbers, nothing that could be run.
///
/// Layout: the header's length as a little-endian uint64; the header, JSON with the dtype, shape
/// and range of bytes of every tensor, and under "__metadata__" strings; the bytes.
struct SafeTensors {
  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> metadata;

  /// @throws Error unless every size fits: the file holds the header and exactly the tensors'
  /// bytes, without gaps or overlaps, each as long as its dtype and shape say. Takes no more memory
  /// than twice the data's size, and less than 1 GB for a hostile header, of at most 4 MB.
  static SafeTensors parse(const std::vector<std::byte>& data);
  static SafeTensors read(const std::filesystem::path& path);

  std::vector<std::byte> serialise() const;
  /// Writes beside `path` and renames: another process sees the old file or the new one.
  void write(const std::filesystem::path& path) const;

  /// Takes the tensor of that name out, as float32: F32 as it is, F16 and BF16 exactly.
  /// @throws Error if there is none, or of another dtype or shape.
  std::vector<float> take(const std::string& name, const std::vector<int64_t>& shape);
  /// @throws Error if a tensor is left that nobody took.
  void check_all_taken() const;

  /// A number that any changed byte of a tensor, name or text changes. Not against forgery.
  uint64_t checksum() const;
};

}  // namespace engine
