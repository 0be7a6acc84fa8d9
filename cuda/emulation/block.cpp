// SPDX-License-Identifier: Apache-2.0
// Scheduling and barriers. Everything here also runs under TSan, as code that it does not
// instrument: threads are then ordered by the tags of barriers alone. It must not call what TSan
// intercepts (allocation, memcpy) on the stack of a kernel's thread.
#include "cuda/emulation/block.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/emulation/cuda_emulation.h"

constinit thread_local uint3 threadIdx{};
constinit thread_local uint3 blockIdx{};
constinit thread_local dim3 blockDim{};
constinit thread_local dim3 gridDim{};

namespace latte::emulation {

namespace {

#ifdef LATTE_EMULATION_ASAN
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 0;  // the allocation has the exact size, ASan watches its end
#else
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 64;
#endif
#ifdef LATTE_EMULATION_TSAN
constexpr bool kRenewPages = true;
#else
constexpr bool kRenewPages = false;
#endif

constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;
constexpr uint64_t kStackMark = 0x5afe57ac5afe57acull;
constexpr uint64_t kSpinsWithoutProgress = 1'000'000;

thread_local Block* running = nullptr;

const char* text_of(Wait wait) {
  switch (wait) {
    case Wait::none:
      return "running";
    case Wait::block_barrier:
      return "__syncthreads";
    case Wait::named_barrier:
      return "named barrier";
    case Wait::warp_barrier:
      return "__syncwarp";
    case Wait::shuffle:
      return "shuffle";
    case Wait::ballot:
      return "ballot";
    case Wait::mma:
      return "mma";
    case Wait::ldmatrix:
      return "ldmatrix";
  }
  return "";
}

std::string text_of(CallSite site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

bool same(CallSite a, CallSite b) { return a.line == b.line; }

}  // namespace

Block& running_block() { return *running; }

unsigned char* Pages::map(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  return static_cast<unsigned char*>(data);
}

#ifndef LATTE_EMULATION_TSAN
SharedMemory::SharedMemory(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 1024, bytes) != 0) throw std::bad_alloc();
  data_ = static_cast<unsigned char*>(data);
}
#endif

Block::Block(dim3 grid, dim3 shape, size_t shared_bytes, const std::function<void()>& kernel)
    : grid_(grid),
      shape_(shape),
      shared_bytes_(shared_bytes),
      kernel_(kernel),
      threads_(size_t{shape.x} * shape.y * shape.z),
      warps_((threads_.size() + kWarp - 1) / kWarp),
      ready_(threads_.size()),
      stacks_(threads_.size() * kStackBytes),
      tags_(2 * (1 + kNamedBarriers) + warps_.size() * kWarp * 2),
      shared_(shared_bytes + kGuardBytes) {
  adopt_thread(worker_);
  tsan_identities_.resize(threads_.size() * kIdentitySets);
}

Block::~Block() {
  // A thread that faulted is still inside of its kernel, as TSan sees it.
  if (fault_) return;
  for (void* identity : tsan_identities_)
    if (identity) return_tsan_identity(identity);
}

void Block::run(uint3 index) {
  running = this;
  reset(index);
  order_release(&start_tag_);
  Thread& first = *pop();
  switch_to(worker_, first);
  running = nullptr;
  if (fault_) {
    for (Thread& thread : threads_) order_release_of(thread.fiber, worker_, &end_tag_);
    throw report();
  }
  check_memory();
  ++counters.blocks;
}

void Block::finish() { order_acquire(&end_tag_); }

void Block::reset(uint3 index) {
  if (kRenewPages) {
    stacks_.renew();
    tags_.renew();
  }
  shared_.renew();
  std::memset(shared_.data(), kPoison, shared_bytes_);
  std::memset(shared_.data() + shared_bytes_, kGuard, kGuardBytes);
  blockIdx = index;
  blockDim = shape_;
  gridDim = grid_;
  // The order of a block's threads depends on the block alone, however many workers there are.
  const uint64_t number = (uint64_t{index.z} * grid_.y + index.y) * grid_.x + index.x;
  random_state_ =
      (options().seed + 1) * 0x9e3779b97f4a7c15ull ^ (number + 1) * 0xbf58476d1ce4e5b9ull;
  barrier_ = {};
  std::fill(named_, named_ + kNamedBarriers, Barrier{});
  for (size_t w = 0; w < warps_.size(); ++w) {
    const size_t lanes = std::min<size_t>(kWarp, threads_.size() - w * kWarp);
    warps_[w] = {};
    warps_[w].absent = lanes == kWarp ? 0 : kAllLanes << lanes;
  }
  alive_ = static_cast<int>(threads_.size());
  idle_spins_ = 0;
  ready_head_ = ready_count_ = 0;
  for (int i = 0; i < alive_; ++i) {
    Thread& thread = threads_[static_cast<size_t>(i)];
    const unsigned n = static_cast<unsigned>(i);
    thread.number = i;
    thread.index = {n % shape_.x, n / shape_.x % shape_.y, n / (shape_.x * shape_.y)};
    thread.site = {};
    thread.copy_head = thread.copy_tail = thread.group_head = thread.group_tail = 0;
    unsigned char* stack = stacks_.data() + static_cast<size_t>(i) * kStackBytes;
    std::memcpy(stack, &kStackMark, sizeof(kStackMark));
    create_fiber(thread.fiber, stack, kStackBytes, thread_main);
    void*& identity =
        tsan_identities_[counters.blocks % kIdentitySets * threads_.size() + size_t{n}];
    if (!identity) identity = take_tsan_identity();
    thread.fiber.tsan = identity;
    push(thread);
  }
}

void Block::check_memory() {
  for (const Thread& thread : threads_)
    if (std::memcmp(thread.fiber.stack, &kStackMark, sizeof(kStackMark)) != 0)
      throw Fault("[emulation] a kernel's stack overflowed");
  for (size_t i = 0; i < kGuardBytes; ++i)
    if (shared_.data()[shared_bytes_ + i] != kGuard)
      throw Fault("[emulation] a kernel wrote beyond its " + std::to_string(shared_bytes_) +
                  " bytes of shared memory");
}

bool Block::in_shared(const void* address, size_t bytes) const {
  const auto* p = static_cast<const unsigned char*>(address);
  return p >= shared_.data() && p + bytes <= shared_.data() + shared_bytes_;
}

void Block::thread_main() {
  Block& block = running_block();
  fiber_entered(block.worker_);
  order_acquire(&block.start_tag_);
  block.kernel_();
  block.leave();
}

void Block::leave() {
  Thread& me = current();
  order_release(&end_tag_);
  if (me.copy_head != me.copy_tail) fault("cp.async still in flight when the thread exits");
  if (barrier_.arrived) fault("a thread exits while others wait at __syncthreads");
  me.state = ThreadState::done;
  --alive_;
  Warp& warp = warp_of(me);
  warp.absent |= 1u << me.lane();
  for (int i = warp.pending_count - 1; i >= 0; --i)
    complete_if_full(warp, warp.pending[i], lanes_of(me));
  if (alive_ == 0) {
    for (const Barrier& named : named_)
      if (named.arrived) fault("a named barrier is left with partners missing");
    switch_fiber(me.fiber, worker_);
  }
  reschedule();
}

// ---- the ready queue ----

uint64_t Block::random() {
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return random_state_;
}

void Block::push(Thread& thread) {
  thread.state = ThreadState::ready;
  thread.wait = Wait::none;
  ready_[(ready_head_ + ready_count_++) % ready_.size()] = thread.number;
}

Thread* Block::pop() {
  if (ready_count_ == 0) return nullptr;
  if (options().shuffle) {
    const size_t chosen = (ready_head_ + random() % ready_count_) % ready_.size();
    std::swap(ready_[ready_head_], ready_[chosen]);
  }
  Thread& thread = threads_[static_cast<size_t>(ready_[ready_head_])];
  ready_head_ = (ready_head_ + 1) % ready_.size();
  --ready_count_;
  return &thread;
}

void Block::switch_to(Fiber& from, Thread& to) {
  ++counters.switches;
  current_ = &to;
  threadIdx = to.index;
  switch_fiber(from, to.fiber);
}

void Block::reschedule() {
  Thread& me = current();
  Thread* next = pop();
  if (!next) fault("deadlock: no thread can go on");
  if (next != &me) switch_to(me.fiber, *next);
}

void Block::wait_for(Wait wait, CallSite site) {
  Thread& me = current();
  me.state = ThreadState::waiting;
  me.wait = wait;
  me.site = site;
}

void Block::release(Wait wait, int barrier_id) {
  idle_spins_ = 0;
  for (Thread& thread : threads_)
    if (thread.state == ThreadState::waiting && thread.wait == wait &&
        thread.barrier_id == barrier_id)
      push(thread);
}

void Block::spin_pause(CallSite site) {
  Thread& me = current();
  me.site = site;
  if (++idle_spins_ > kSpinsWithoutProgress) fault("spins without progress");
  if (ready_count_ == 0) sched_yield();  // what it waits for is another worker's block
  push(me);
  reschedule();
}

// ---- barriers ----
// A barrier's happens-before tag alternates with its generation. With one tag, a thread that wakes
// late would also acquire what early ones released at the next barrier, which hides the races
// between the two.

int Block::block_barrier(Vote vote, bool predicate, CallSite site) {
  Thread& me = current();
  Barrier& barrier = barrier_;
  wait_for(Wait::block_barrier, site);
  me.barrier_id = 0;
  if (alive_ != static_cast<int>(threads_.size()))
    fault("__syncthreads after other threads of the block have exited");
  if (barrier.arrived == 0) {
    barrier.vote = vote;
    barrier.site = site;
    barrier.count = 0;
  } else if (barrier.vote != vote || !same(barrier.site, site)) {
    fault("diverged __syncthreads: other threads wait", kNoNumber, barrier.site);
  }
  barrier.count += predicate;
  const unsigned parity = barrier.generation % 2;
  void* tag = tags_.data() + parity;
  order_release(tag);
  if (++barrier.arrived == alive_) {
    // Latched: the next barrier may begin to count before all threads have read the result.
    latched_votes_[parity] = barrier.count;
    barrier.arrived = 0;
    ++barrier.generation;
    ++counters.block_barriers;
    release(Wait::block_barrier, 0);
  }
  reschedule();
  order_acquire(tag);
  const int votes = latched_votes_[parity];
  switch (vote) {
    case Vote::none:
      return 0;
    case Vote::any:
      return votes != 0;
    case Vote::all:
      return votes == static_cast<int>(threads_.size());
    case Vote::count:
      return votes;
  }
  return 0;
}

void Block::named_barrier(int id, int threads, bool wait, CallSite site) {
  Thread& me = current();
  me.site = site;
  // Barrier 0 is __syncthreads.
  if (id < 1 || id >= kNamedBarriers) fault("id of a named barrier, expected 1 to 15, not", id);
  if (threads <= 0 || threads % kWarp != 0 || threads > static_cast<int>(threads_.size()))
    fault("threads of a named barrier, expected whole warps, not", threads);
  Barrier& barrier = named_[id];
  if (barrier.arrived == 0)
    barrier.threads = threads;
  else if (barrier.threads != threads)
    fault("named barrier of another number of threads than the first to arrive, namely",
          barrier.threads);
  void* tag = tags_.data() + 2 * (1 + id) + barrier.generation % 2;
  order_release(tag);
  if (wait) {
    wait_for(Wait::named_barrier, site);
    me.barrier_id = id;
  }
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++counters.named_barriers;
    release(Wait::named_barrier, id);
  }
  if (!wait) return;
  reschedule();
  order_acquire(tag);
}

// ---- warp collectives ----

Collective& Block::join(Wait kind, int variant, unsigned mask, CallSite site, Operation operation) {
  Thread& me = current();
  Warp& warp = warp_of(me);
  if (!(mask >> me.lane() & 1)) fault("the calling lane is not in the mask of its collective");
  for (int i = 0; i < warp.pending_count; ++i) {
    Collective& pending = warp.pending[i];
    if (pending.mask == mask) {
      if (pending.kind != kind || pending.variant != variant || !same(pending.site, site))
        fault("diverged warp: other lanes wait", kNoNumber, pending.site);
      return pending;
    }
    if (pending.mask & mask)
      fault("diverged warp: other lanes wait with another mask", kNoNumber, pending.site);
  }
  Collective& fresh = warp.pending[warp.pending_count++];
  fresh = {mask, 0, kind, variant, site, operation};
  return fresh;
}

void Block::complete_if_full(Warp& warp, Collective& collective, Thread* lanes) {
  if (((collective.arrived | warp.absent) & collective.mask) != collective.mask) return;
  const Collective full = collective;
  full.operation(*this, lanes, full.arrived, full.variant);
  collective = warp.pending[--warp.pending_count];
  ++warp.generation[__builtin_ctz(full.mask)];
  idle_spins_ = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if (full.arrived >> lane & 1) push(lanes[lane]);
}

void Block::collective(Wait kind, int variant, unsigned mask, CallSite site, Operation operation) {
  Thread& me = current();
  wait_for(kind, site);
  Collective& collective = join(kind, variant, mask, site, operation);
  collective.arrived |= 1u << me.lane();
  complete_if_full(warp_of(me), collective, lanes_of(me));
  reschedule();
}

void Block::warp_barrier(unsigned mask, CallSite site) {
  if (mask == 0) fault("__syncwarp without lanes");
  const Thread& me = current();
  const int leader = __builtin_ctz(mask);
  const size_t warp = static_cast<size_t>(me.number / kWarp);
  void* tag = tags_.data() + 2 * (1 + kNamedBarriers) +
              (warp * kWarp + static_cast<size_t>(leader)) * 2 +
              warps_[warp].generation[leader] % 2;
  order_release(tag);
  collective(Wait::warp_barrier, 0, mask, site, [](Block&, Thread*, unsigned, int) {});
  order_acquire(tag);
}

// ---- reports ----

void Block::fault(const char* what, int number, CallSite other) {
  // The stack is abandoned with all that its destructors would free: nothing here owns memory.
  fault_ = what;
  fault_number_ = number;
  fault_other_ = other;
  switch_fiber(current().fiber, worker_);
  std::abort();  // nobody switches back to a faulted block
}

Fault Block::report() const {
  const auto at = [](const uint3& i) {
    return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
  };
  std::string text = std::string("[emulation] ") + fault_;
  if (fault_number_ != kNoNumber) text += " " + std::to_string(fault_number_);
  if (fault_other_.line) text += " at " + text_of(fault_other_);
  return Fault(text + "; block " + at(blockIdx) + " thread " + at(current_->index) + " at " +
               text_of(current_->site) + waiting());
}

std::string Block::waiting() const {
  std::string text;
  const Thread* previous = nullptr;
  int same_place = 0;
  const auto flush = [&] {
    if (previous)
      text += "\n  " + std::to_string(same_place) + " threads from " +
              std::to_string(previous->number) + " on wait for " + text_of(previous->wait) +
              " at " + text_of(previous->site);
  };
  for (const Thread& thread : threads_) {
    if (thread.state != ThreadState::waiting) continue;
    if (!previous || previous->wait != thread.wait || !same(previous->site, thread.site)) {
      flush();
      previous = &thread;
      same_place = 0;
    }
    ++same_place;
  }
  flush();
  return text;
}

}  // namespace latte::emulation
