// SPDX-License-Identifier: Apache-2.0
// cp.async: copies wait in their thread's queue until the thread waits for their group.
#include "cuda/emulation/block.h"

namespace latte::emulation {

void async_issue(const AsyncCopy& copy, CallSite site) {
  Block& block = running_block();
  Thread& me = block.current();
  me.site = site;
  const auto target = reinterpret_cast<uintptr_t>(copy.target);
  const auto source = reinterpret_cast<uintptr_t>(copy.source);
  if ((target | source) % sizeof(uint4) != 0) block.fault("misaligned cp.async");
  if (!block.in_shared(copy.target, sizeof(uint4)))
    block.fault("cp.async to outside of shared memory");
  if (me.copy_tail - me.copy_head == Thread::kCopies) block.fault("too many cp.async in flight");
  me.copies[me.copy_tail++ % Thread::kCopies] = copy;
  if (copy.valid) block.counters.async_bytes += sizeof(uint4);
}

void async_commit(CallSite site) {
  Block& block = running_block();
  Thread& me = block.current();
  me.site = site;
  if (me.group_tail - me.group_head == Thread::kGroups)
    block.fault("too many groups of cp.async in flight");
  me.group_ends[me.group_tail++ % Thread::kGroups] = me.copy_tail;
}

bool async_next(int allowed, AsyncCopy& copy) {
  Thread& me = running_block().current();
  while (me.group_tail - me.group_head > static_cast<uint32_t>(allowed)) {
    if (me.copy_head != me.group_ends[me.group_head % Thread::kGroups]) {
      copy = me.copies[me.copy_head++ % Thread::kCopies];
      return true;
    }
    ++me.group_head;
  }
  return false;
}

}  // namespace latte::emulation
