// SPDX-License-Identifier: Apache-2.0
// One block in flight: its threads, its memory and the barriers they meet at.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "cuda/emulation/fiber.h"
#include "cuda/emulation/runtime.h"

namespace latte::emulation {

constexpr int kWarp = 32;
constexpr int kNamedBarriers = 16;
constexpr unsigned kAllLanes = 0xffffffffu;

enum class ThreadState : uint8_t { ready, waiting, done };

// Why a thread waits, for the report of a deadlock; also what a warp collective must agree on.
enum class Wait : uint8_t {
  none,
  block_barrier,
  named_barrier,
  warp_barrier,
  shuffle,
  ballot,
  mma,
  ldmatrix,
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int number = 0;
  ThreadState state = ThreadState::ready;
  Wait wait = Wait::none;
  CallSite site;
  int barrier_id = 0;  // of the named barrier it waits at
  uint64_t in[10];     // a lane's operands of a warp collective
  uint64_t out[4];

  // cp.async: copies [head, tail), of which [head, group_ends[group_head]) are the oldest group.
  static constexpr uint32_t kCopies = 256, kGroups = 64;
  AsyncCopy copies[kCopies];
  uint32_t copy_head = 0, copy_tail = 0;
  uint32_t group_ends[kGroups];
  uint32_t group_head = 0, group_tail = 0;

  int lane() const { return number % kWarp; }
};

class Block;

// What the lanes of a warp do together, given their operands; `variant` is the same for all.
using Operation = void (*)(Block& block, Thread* lanes, unsigned mask, int variant);

// A warp collective that some of its lanes have reached. Disjoint masks may be under way at once.
struct Collective {
  unsigned mask, arrived;
  Wait kind;
  int variant;
  CallSite site;
  Operation operation;
};

struct Warp {
  Collective pending[kWarp];
  int pending_count = 0;
  unsigned absent = 0;  // lanes that have left the kernel, or that the block does not have
  uint8_t generation[kWarp] = {};  // of collectives, by their lowest lane
};

struct Barrier {
  int arrived = 0, threads = 0;
  Vote vote = Vote::none;
  CallSite site;
  int count = 0;  // of true predicates
  unsigned generation = 0;
};

// Anonymous memory. Under TSan each block needs it afresh: mapping resets what TSan remembers of
// the addresses, so that a block is not told to race with an earlier user of the same ones.
class Pages {
 public:
  explicit Pages(size_t bytes) : bytes_(bytes), data_(map(bytes)) {}
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages() { munmap(data_, bytes_); }
  void renew() {
    munmap(data_, bytes_);
    data_ = map(bytes_);
  }
  unsigned char* data() const { return data_; }

 private:
  static unsigned char* map(size_t bytes);
  size_t bytes_;
  unsigned char* data_;
};

// Shared memory of a block. A heap block of the exact size, so that ASan sees an overrun; under
// TSan pages, for the reason above.
#ifdef LATTE_EMULATION_TSAN
using SharedMemory = Pages;
#else
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes);
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() { std::free(data_); }
  void renew() {}
  unsigned char* data() const { return data_; }

 private:
  unsigned char* data_;
};
#endif

class Block {
 public:
  Block(dim3 grid, dim3 shape, size_t shared_bytes, const std::function<void()>& kernel);
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block();

  void run(uint3 index);  // throws Fault
  void finish();          // after the last run: the host sees what the threads wrote

  // The rest is called on the stack of the running thread.
  Thread& current() { return *current_; }
  Warp& warp_of(const Thread& thread) { return warps_[static_cast<size_t>(thread.number / kWarp)]; }
  Thread* lanes_of(const Thread& thread) {
    return &threads_[static_cast<size_t>(thread.number / kWarp * kWarp)];
  }
  unsigned char* shared() const { return shared_.data(); }
  bool in_shared(const void* address, size_t bytes) const;

  int block_barrier(Vote vote, bool predicate, CallSite site);
  void named_barrier(int id, int threads, bool wait, CallSite site);
  // Waits until all lanes of `mask` that have not exited have come; then `operation` runs, once.
  void collective(Wait kind, int variant, unsigned mask, CallSite site, Operation operation);
  void warp_barrier(unsigned mask, CallSite site);
  void spin_pause(CallSite site);

  // Ends the block; its report is "<what> [<number>] [at <other>]" and who called where.
  static constexpr int kNoNumber = -1 << 30;
  [[noreturn]] void fault(const char* what, int number = kNoNumber, CallSite other = {});

  Counters counters;

 private:
  static void thread_main();
  void leave();
  void reset(uint3 index);
  void push(Thread& thread);
  Thread* pop();
  void switch_to(Fiber& from, Thread& to);
  void reschedule();
  void wait_for(Wait wait, CallSite site);
  void release(Wait wait, int barrier_id);
  Collective& join(Wait kind, int variant, unsigned mask, CallSite site, Operation operation);
  void complete_if_full(Warp& warp, Collective& collective, Thread* lanes);
  Fault report() const;
  std::string waiting() const;
  void check_memory();
  uint64_t random();

  const dim3 grid_, shape_;
  const size_t shared_bytes_;
  const std::function<void()>& kernel_;
  uint64_t random_state_ = 0;
  int alive_ = 0;
  uint64_t idle_spins_ = 0;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<int> ready_;  // a ring
  size_t ready_head_ = 0, ready_count_ = 0;
  Pages stacks_, tags_;
  SharedMemory shared_;

  // Consecutive blocks of a worker are different people to TSan, so that it sees their races.
  static constexpr size_t kIdentitySets = 2;
  std::vector<void*> tsan_identities_;

  const char* fault_ = nullptr;
  int fault_number_ = kNoNumber;
  CallSite fault_other_;

  Barrier barrier_;
  int latched_votes_[2] = {};
  Barrier named_[kNamedBarriers];
  Fiber worker_;
  Thread* current_ = nullptr;
  char start_tag_ = 0, end_tag_ = 0;
};

// The block that the calling worker runs.
Block& running_block();

}  // namespace latte::emulation
