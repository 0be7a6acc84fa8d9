// SPDX-License-Identifier: Apache-2.0
// Launches: the blocks of a grid over worker threads, and what kernels ask of the running block.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda/emulation/block.h"

namespace latte::emulation {

namespace {

std::mutex totals_mutex;
Counters totals;

// A kernel's fence on the device orders it with every other fence that it can observe.
char fence_tag;

Options from_environment() {
  Options options;
  if (const char* seed = std::getenv("LATTE_EMULATION_SEED")) {
    options.shuffle = true;
    options.seed = std::strtoull(seed, nullptr, 10);
  }
  if (const char* workers = std::getenv("LATTE_EMULATION_WORKERS"))
    options.workers = std::max(1, std::atoi(workers));
  return options;
}

void add(Counters& sum, const Counters& part) {
  sum.blocks += part.blocks;
  sum.switches += part.switches;
  sum.block_barriers += part.block_barriers;
  sum.named_barriers += part.named_barriers;
  sum.mma += part.mma;
  sum.ldmatrix += part.ldmatrix;
  sum.ldmatrix_conflicts += part.ldmatrix_conflicts;
  sum.async_bytes += part.async_bytes;
  sum.load_bytes += part.load_bytes;
  sum.store_bytes += part.store_bytes;
}

// The limits of every architecture that is built for.
void check_configuration(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64)
    throw Fault("[emulation] a block of " + std::to_string(threads) + " threads");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw Fault("[emulation] a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                " x " + std::to_string(grid.z) + " blocks");
  if (shared_bytes > static_cast<size_t>(options().shared_bytes))
    throw Fault("[emulation] " + std::to_string(shared_bytes) + " bytes of shared memory");
}

std::vector<uint64_t> block_order(uint64_t blocks) {
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  if (!options().shuffle) return order;
  uint64_t state = (options().seed + 1) * 0x9e3779b97f4a7c15ull;
  for (uint64_t i = blocks - 1; i > 0; --i) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    std::swap(order[i], order[state % (i + 1)]);
  }
  return order;
}

}  // namespace

Options& options() {
  static Options options = from_environment();
  return options;
}

Counters counters() {
  const std::lock_guard lock(totals_mutex);
  return totals;
}

void reset_counters() {
  const std::lock_guard lock(totals_mutex);
  totals = {};
}

void run_grid(dim3 grid, dim3 shape, size_t shared_bytes, const std::function<void()>& kernel) {
  check_configuration(grid, shape, shared_bytes);
  const std::vector<uint64_t> order = block_order(uint64_t{grid.x} * grid.y * grid.z);
  std::atomic<uint64_t> next{0};
  std::exception_ptr failure;
  const auto work = [&] {
    Block block(grid, shape, shared_bytes, kernel);
    try {
      for (uint64_t i; (i = next++) < order.size();) {
        const uint64_t n = order[i];
        block.run({static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x % grid.y),
                   static_cast<unsigned>(n / grid.x / grid.y)});
      }
    } catch (...) {
      next = order.size();
      const std::lock_guard lock(totals_mutex);
      failure = std::current_exception();
    }
    block.finish();
    const std::lock_guard lock(totals_mutex);
    add(totals, block.counters);
  };
  const auto workers = std::min<uint64_t>(static_cast<uint64_t>(options().workers), order.size());
  if (workers == 1) {
    work();
  } else {
    std::vector<std::thread> threads;
    for (uint64_t i = 0; i < workers; ++i) threads.emplace_back(work);
    for (std::thread& thread : threads) thread.join();
  }
  if (failure) std::rethrow_exception(failure);
}

unsigned char* shared_memory() { return running_block().shared(); }

int block_barrier(Vote vote, bool predicate, CallSite site) {
  return running_block().block_barrier(vote, predicate, site);
}

void named_barrier(int id, int threads, bool wait, CallSite site) {
  running_block().named_barrier(id, threads, wait, site);
}

void warp_barrier(unsigned mask, CallSite site) { running_block().warp_barrier(mask, site); }

void spin_pause(CallSite site) { running_block().spin_pause(site); }

void memory_fence() {
  order_acquire(&fence_tag);
  order_release(&fence_tag);
}

void count_load(size_t bytes) { running_block().counters.load_bytes += bytes; }

void count_store(size_t bytes) { running_block().counters.store_bytes += bytes; }

}  // namespace latte::emulation
