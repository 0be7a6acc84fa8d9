// SPDX-License-Identifier: Apache-2.0
// Stacks that a worker thread switches between: one per emulated CUDA thread.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace latte::emulation {

// A stack of execution. A fiber never moves to another worker thread.
struct Fiber {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  const void* stack = nullptr;  // lowest address; unknown for a worker's own stack until it is left
  size_t stack_bytes = 0;
  void* tsan = nullptr;        // who TSan takes this fiber for
  void* fake_stack = nullptr;  // ASan's stack of locals that outlive their scope
};

// `fiber` will run entry() on `stack` when first switched to; entry must not return.
void create_fiber(Fiber& fiber, void* stack, size_t stack_bytes, void (*entry)());
// `fiber` becomes the stack of the calling worker thread.
void adopt_thread(Fiber& fiber);

// An identity under TSan for Fiber::tsan; null without TSan. They are kept and given out again,
// since TSan takes half a millisecond to make one: whoever gets it next is ordered after its past.
void* take_tsan_identity();
void return_tsan_identity(void* identity);

// Orders nothing by itself: for TSan two fibers are as concurrent as two threads.
void switch_fiber(Fiber& from, Fiber& to);
// The first thing that an entry does. `from` is the worker's fiber.
void fiber_entered(Fiber& from);

// The only happens-before edges between fibers: what was released is visible after the acquire.
void order_release(void* tag);
void order_acquire(void* tag);
// Releases for a fiber that will not run again.
void order_release_of(Fiber& fiber, Fiber& running, void* tag);

}  // namespace latte::emulation
