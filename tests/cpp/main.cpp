// SPDX-License-Identifier: Apache-2.0
// The test program, with a count of every allocation made through operator new, the library's too.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

namespace latte_test {
namespace {
std::atomic<int64_t> allocations{0};
}
int64_t allocation_count() { return allocations; }
}  // namespace latte_test

void* operator new(size_t bytes) {
  ++latte_test::allocations;
  void* p = std::malloc(bytes ? bytes : 1);
  if (!p) throw std::bad_alloc();
  return p;
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
