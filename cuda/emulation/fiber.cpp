// SPDX-License-Identifier: Apache-2.0
#include "cuda/emulation/fiber.h"

#include <cstdint>
#include <mutex>
#include <vector>

#ifdef LATTE_EMULATION_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#ifdef LATTE_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
// Pushes what the System V ABI lets a callee keep, exchanges the stacks, pops and returns there.
extern "C" void latte_emulation_switch(void** save, void* load);
asm(R"(
.text
.globl latte_emulation_switch
.hidden latte_emulation_switch
.type latte_emulation_switch,@function
latte_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size latte_emulation_switch, .-latte_emulation_switch
)");
#endif

namespace latte::emulation {

#ifdef LATTE_EMULATION_TSAN
constexpr unsigned kNoSynchronisation = 1;
#endif

void create_fiber(Fiber& fiber, void* stack, size_t stack_bytes, void (*entry)()) {
  fiber.stack = stack;
  fiber.stack_bytes = stack_bytes;
  fiber.fake_stack = nullptr;
#ifdef LATTE_EMULATION_ASAN
  // What ran here before left by switching away, so its frames are still poisoned.
  __asan_unpoison_memory_region(stack, stack_bytes);
#endif
#ifdef __x86_64__
  // As if entry had been called: 16-byte aligned below its return address, here null to end traces.
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + stack_bytes) & ~uintptr_t{15};
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;
  *--sp = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--sp = nullptr;
  fiber.stack_pointer = sp;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void adopt_thread(Fiber& fiber) {
#ifdef LATTE_EMULATION_TSAN
  fiber.tsan = __tsan_get_current_fiber();
#endif
  fiber.fake_stack = nullptr;
}

#ifdef LATTE_EMULATION_TSAN

namespace {
std::mutex identities_mutex;
std::vector<void*> identities;
}  // namespace

void* take_tsan_identity() {
  const std::lock_guard lock(identities_mutex);
  if (identities.empty()) return __tsan_create_fiber(0);
  void* identity = identities.back();
  identities.pop_back();
  return identity;
}

void return_tsan_identity(void* identity) {
  const std::lock_guard lock(identities_mutex);
  identities.push_back(identity);
}

#else

void* take_tsan_identity() { return nullptr; }

void return_tsan_identity(void*) {}

#endif

void switch_fiber(Fiber& from, Fiber& to) {
#ifdef LATTE_EMULATION_TSAN
  __tsan_switch_to_fiber(to.tsan, kNoSynchronisation);
#endif
#ifdef LATTE_EMULATION_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef __x86_64__
  latte_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#ifdef LATTE_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void fiber_entered([[maybe_unused]] Fiber& from) {
#ifdef LATTE_EMULATION_ASAN
  // The bounds are those of the stack just left; only the first entry leaves the worker's own.
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (!from.stack) {
    from.stack = stack;
    from.stack_bytes = bytes;
  }
#endif
}

void order_release([[maybe_unused]] void* tag) {
#ifdef LATTE_EMULATION_TSAN
  __tsan_release(tag);
#endif
}

void order_acquire([[maybe_unused]] void* tag) {
#ifdef LATTE_EMULATION_TSAN
  __tsan_acquire(tag);
#endif
}

void order_release_of([[maybe_unused]] Fiber& fiber, [[maybe_unused]] Fiber& running,
                      [[maybe_unused]] void* tag) {
#ifdef LATTE_EMULATION_TSAN
  __tsan_switch_to_fiber(fiber.tsan, kNoSynchronisation);
  __tsan_release(tag);
  __tsan_switch_to_fiber(running.tsan, kNoSynchronisation);
#endif
}

}  // namespace latte::emulation
