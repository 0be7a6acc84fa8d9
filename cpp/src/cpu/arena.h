// SPDX-License-Identifier: Apache-2.0
// Carves arrays out of the caller's workspace. With a null base it only measures, so that one
// layout function gives both the size and the pointers.
#pragma once

#include <cstdint>

namespace latte::LATTE_ISA {

class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace latte::LATTE_ISA
