// SPDX-License-Identifier: Apache-2.0
// Checks that every operator's validation is made of.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <string>

#include "common/validate.h"
#include "latte/latte.h"

namespace latte {

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::float64:
      return "float64";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
    case DType::boolean:
      return "bool";
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
  }
  return "unknown";
}

inline std::string shape_text(const int64_t* shape, int64_t rank) {
  std::string text = "(";
  // A Tensor holds four sizes, whatever its rank.
  for (int64_t i = 0; i < rank && i < 4; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (rank > 4 ? ", ...)" : rank == 1 ? ",)" : ")");
}

// Checks the arguments of one call; every message starts with the op's name in brackets.
class BaseChecker {
 public:
  explicit BaseChecker(const char* op, Memory memory = Memory::host) : op_(op), memory_(memory) {}

  [[noreturn]] void fail(Error::Kind kind, const std::string& text) const {
    throw Error(kind, "[" + std::string(op_) + "] " + text);
  }

  void rank(const char* name, const Tensor& t, int64_t expected, const char* axes) const {
    if (t.rank != expected)
      fail(Error::Kind::value, std::string(name) + " has shape " + shape_text(t.shape, t.rank) +
                                   ", expected " + std::to_string(expected) + " dimensions " +
                                   axes);
  }

  void shape(const char* name, const Tensor& t, std::initializer_list<int64_t> expected,
             const char* axes) const {
    bool same = t.rank == static_cast<int64_t>(expected.size());
    for (int64_t i = 0; same && i < t.rank; ++i) same = t.shape[i] == expected.begin()[i];
    if (!same)
      fail(Error::Kind::value,
           std::string(name) + " has shape " + shape_text(t.shape, t.rank) + ", expected " +
               shape_text(expected.begin(), static_cast<int64_t>(expected.size())) + " = " + axes);
    memory(name, t);
  }

  // A tensor of this rank may be there: sizes that no workspace overflows by, memory unless empty.
  void memory(const char* name, const Tensor& t) const {
    constexpr int64_t kMost = 281'474'976'710'656;  // 2^48
    int64_t count = 1;
    for (int64_t i = 0; i < t.rank; ++i) {
      if (t.shape[i] < 0 || (count > 0 && t.shape[i] > kMost / count))
        fail(Error::Kind::value, std::string(name) + " has shape " + shape_text(t.shape, t.rank) +
                                     ", expected sizes from 0, at most 2^48 elements");
      count *= t.shape[i];
    }
    if (!t.data && count > 0)
      fail(Error::Kind::value, std::string(name) + " has no data, expected a pointer to memory");
  }

  void dtype(const char* name, const Tensor& t, std::initializer_list<DType> allowed) const {
    for (const DType d : allowed)
      if (t.dtype == d) return;
    std::string expected;
    for (const DType d : allowed)
      expected += (expected.empty() ? "" : " or ") + std::string(name_of(d));
    fail(Error::Kind::type,
         std::string(name) + " has dtype " + name_of(t.dtype) + ", expected " + expected);
  }

  // An output must not address one element twice. Sufficient, and true of every view that torch
  // makes of a dense tensor without expanding or unfolding it: each stride steps over all that the
  // smaller strides reach.
  void writable(const char* name, const Tensor& t) const {
    for (int64_t i = 0; i < t.rank; ++i)
      if (t.shape[i] == 0) return;
    for (int64_t i = 0; i < t.rank; ++i) {
      if (t.shape[i] == 1) continue;
      const int64_t stride = std::abs(t.stride[i]);
      int64_t reach = 0;
      for (int64_t j = 0; j < t.rank; ++j) {
        const int64_t other = std::abs(t.stride[j]);
        if (other < stride || (other == stride && j < i)) reach += (t.shape[j] - 1) * other;
      }
      if (stride <= reach || stride == 0)
        fail(Error::Kind::value, std::string(name) + " has stride " + std::to_string(t.stride[i]) +
                                     " in dimension " + std::to_string(i) + " of shape " +
                                     shape_text(t.shape, t.rank) +
                                     ", expected an output that addresses each element once");
    }
  }

  // Two outputs are not the same memory. (That they overlap elsewhere is not looked for: fields of
  // a packed buffer interleave.)
  void apart(const char* name, const Tensor& a, const char* other, const Tensor& b) const {
    bool empty = false;
    for (int64_t i = 0; i < a.rank; ++i) empty |= a.shape[i] == 0;
    if (!empty && a.data == b.data)
      fail(Error::Kind::value,
           std::string(name) + " has the memory of " + other + ", expected memory of its own");
  }

  // The number of sequences packed along the tokens of `name`, whose batch must be 1.
  int64_t sequences(const Tensor& cu_seqlens, const char* name, int64_t batch,
                    int64_t tokens) const {
    dtype("cu_seqlens", cu_seqlens, {DType::int32, DType::int64});
    rank("cu_seqlens", cu_seqlens, 1, "(sequences + 1,)");
    memory("cu_seqlens", cu_seqlens);
    const int64_t borders = cu_seqlens.shape[0];
    if (batch != 1)
      fail(Error::Kind::value, std::string(name) + " has batch " + std::to_string(batch) +
                                   ", expected 1 with cu_seqlens");
    if (borders < 1)
      fail(Error::Kind::value, "cu_seqlens has 0 elements, expected the number of sequences + 1");
    if (reads_values()) rising(cu_seqlens, tokens);
    return borders - 1;
  }

 protected:
  bool reads_values() const { return memory_ == Memory::host; }

 private:
  // From 0 to the number of tokens.
  void rising(const Tensor& cu_seqlens, int64_t tokens) const {
    int64_t previous = 0;
    for (int64_t i = 0; i < cu_seqlens.shape[0]; ++i) {
      const int64_t border = sequence_border(cu_seqlens, i);
      if (i == 0 ? border != 0 : border < previous)
        fail(Error::Kind::value, "cu_seqlens[" + std::to_string(i) + "] is " +
                                     std::to_string(border) + ", expected " +
                                     (i == 0 ? "0" : "at least " + std::to_string(previous)));
      previous = border;
    }
    if (previous != tokens)
      fail(Error::Kind::value, "cu_seqlens ends at " + std::to_string(previous) + ", expected " +
                                   std::to_string(tokens) + ", the number of tokens");
  }

  const char* op_;
  Memory memory_;
};

}  // namespace latte
