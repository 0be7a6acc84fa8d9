// SPDX-License-Identifier: Apache-2.0
// What runs emulated kernels: one fiber per CUDA thread, one worker (an OS thread) per block in
// flight. Kernel code reaches it through the CUDA names of cuda_emulation.h and through ptx.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "cuda/emulation/vector_types.h"

namespace latte::emulation {

// What no device would forgive: a diverged collective, a deadlock, a copy still in flight ...
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Where a kernel calls; a default argument, so that it names the caller.
struct CallSite {
  const char* file = "";
  int line = 0;
  static constexpr CallSite current(const char* file = __builtin_FILE(),
                                    int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Initially from the environment: LATTE_EMULATION_SEED=<n> shuffles, LATTE_EMULATION_WORKERS=<n>.
struct Options {
  bool shuffle = false;  // run blocks, and threads between collectives, in an order drawn from:
  uint64_t seed = 0;
  int workers = 1;                // blocks in flight
  int shared_bytes = 227 * 1024;  // that a block may have: of sm_90
};
Options& options();

// Sums over all launches since reset_counters().
struct Counters {
  uint64_t blocks = 0;
  uint64_t switches = 0;            // of fibers
  uint64_t block_barriers = 0;      // per block
  uint64_t named_barriers = 0;      // per block
  uint64_t mma = 0;                 // per warp
  uint64_t ldmatrix = 0;            // 8x8 matrices
  uint64_t ldmatrix_conflicts = 0;  // wavefronts beyond one for each of them
  uint64_t async_bytes = 0;         // read from global memory by cp.async
  uint64_t load_bytes = 0;          // by global_load and __ldg
  uint64_t store_bytes = 0;         // by global_store
};
Counters counters();
void reset_counters();

// Runs the whole grid before it returns; throws Fault.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// ---- called by kernels ----

// The block's dynamic shared memory: poisoned with 0xff, a NaN in every floating-point type.
unsigned char* shared_memory();

enum class Vote { none, any, all, count };
int block_barrier(Vote vote, bool predicate, CallSite site);
// Participants may call from different places: producers and consumers are different code.
void named_barrier(int id, int threads, bool wait, CallSite site);
void warp_barrier(unsigned mask, CallSite site);

enum class Shuffle { index, up, down, exclusive_or };
uint64_t shuffle(Shuffle mode, unsigned mask, uint64_t value, int argument, int width,
                 CallSite site);
unsigned ballot(unsigned mask, bool predicate, CallSite site);

// d += a b on tensor cores, in the register layouts of PTX.
enum class Mma { bfloat16_m16n8k16, float16_m16n8k16, tf32_m16n8k8 };
void mma(Mma kind, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, CallSite site);

// Whether this lane's address matters to ldmatrix.x<count>; then it reads `row` itself, so that
// sanitizers, which do not instrument the runtime, see the access.
bool ldmatrix_reads(int count);
void check_ldmatrix_row(const void* address, CallSite site);
void ldmatrix(uint32_t* result, int count, bool transposed, const void* address, uint4 row,
              CallSite site);

struct AsyncCopy {
  uint4* target;
  const uint4* source;
  bool valid;  // false: zeros, the source is not read
};
// The caller poisons the target at once and copies when async_next() hands the copy back, as late
// as the hardware may.
void async_issue(const AsyncCopy& copy, CallSite site);
void async_commit(CallSite site);
// True while a copy is left that waiting for all but `allowed` groups completes.
bool async_next(int allowed, AsyncCopy& copy);

void count_load(size_t bytes);
void count_store(size_t bytes);

// Lets other threads of the block, and other blocks, go on: the body of every spin loop.
void spin_pause(CallSite site);
void memory_fence();

}  // namespace latte::emulation
