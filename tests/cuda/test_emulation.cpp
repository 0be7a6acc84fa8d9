// SPDX-License-Identifier: Apache-2.0
// The emulation itself: what each CUDA name does, against a plain statement of it.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <vector>

#include "arrays.h"
#include "cuda/device.h"
#include "cuda/ptx.h"

namespace {

using namespace latte::cuda;
namespace emulation = latte::emulation;

constexpr unsigned kFullWarp = 0xffffffffu;

int thread_number() { return static_cast<int>(threadIdx.x); }

// A kernel of one block given as a function.
void run_block(const std::function<void()>* body) { (*body)(); }

void on_block(int threads, size_t shared_bytes, const std::function<void()>& body) {
  launch(run_block, dim3(1), dim3(static_cast<unsigned>(threads)), shared_bytes, nullptr, &body);
}

// What the emulation says of a kernel, or "".
std::string fault_of(int threads, size_t shared_bytes, const std::function<void()>& body) {
  try {
    on_block(threads, shared_bytes, body);
  } catch (const emulation::Fault& fault) {
    return fault.what();
  }
  return "";
}

// ---- launches ----

void number_threads(int* out) {
  const auto block = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const auto thread = (int64_t{threadIdx.z} * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t{blockDim.x} * blockDim.y * blockDim.z;
  out[block * threads + thread] += static_cast<int>(block * threads + thread);
}

TEST(Launch, RunsEveryThreadOfEveryBlockOnce) {
  const dim3 grid(3, 2, 4), block(5, 4, 2);
  std::vector<int> out(3 * 2 * 4 * 40), expected(out.size());
  std::iota(expected.begin(), expected.end(), 0);
  launch(number_threads, grid, block, 0, nullptr, out.data());
  EXPECT_EQ(out, expected);
}

TEST(Launch, OfAnEmptyGridDoesNothing) {
  int out = 7;
  launch(number_threads, dim3(4, 0, 1), dim3(32), 0, nullptr, &out);
  EXPECT_EQ(out, 7);
}

TEST(Launch, RefusesWhatNoDeviceTakes) {
  int* none = nullptr;
  EXPECT_THROW(launch(number_threads, dim3(1), dim3(1025), 0, nullptr, none), emulation::Fault);
  EXPECT_THROW(launch(number_threads, dim3(1, 65536), dim3(1), 0, nullptr, none), emulation::Fault);
  EXPECT_THROW(launch(number_threads, dim3(1), dim3(1), 227 * 1024 + 1, nullptr, none),
               emulation::Fault);
}

TEST(Launch, SharedMemoryIsAlignedAndPoisoned) {
  constexpr size_t kBytes = 4000;
  std::vector<int> poisoned(64);
  on_block(64, kBytes, [&] {
    const unsigned char* shared = shared_memory();
    bool all = reinterpret_cast<uintptr_t>(shared) % 1024 == 0;
    for (size_t i = 0; i < kBytes; ++i) all &= shared[i] == 0xff;
    poisoned[static_cast<size_t>(thread_number())] = all;
  });
  EXPECT_EQ(poisoned, std::vector<int>(64, 1));
}

// The order in which 16 blocks begin under that seed.
std::vector<int> block_order(bool shuffle, uint64_t seed) {
  const emulation::Options before = emulation::options();
  emulation::options().shuffle = shuffle;
  emulation::options().seed = seed;
  emulation::options().workers = 1;
  std::vector<int> order(16);
  int begun = 0;
  const std::function<void()> body = [&] {
    order[static_cast<size_t>(atomicAdd(&begun, 1))] = static_cast<int>(blockIdx.x);
  };
  launch(run_block, dim3(16), dim3(1), 0, nullptr, &body);
  emulation::options() = before;
  return order;
}

TEST(Schedule, IsInOrderOrDrawnFromItsSeed) {
  std::vector<int> in_order(16);
  std::iota(in_order.begin(), in_order.end(), 0);
  EXPECT_EQ(block_order(false, 5), in_order);
  EXPECT_EQ(block_order(true, 5), block_order(true, 5));
  EXPECT_NE(block_order(true, 5), in_order);
  EXPECT_NE(block_order(true, 5), block_order(true, 6));
}

// ---- barriers ----

TEST(Barrier, VotesOverTheWholeBlock) {
  for (int voters : {0, 1, 95, 96}) {
    std::vector<int> any(96), all(96), count(96);
    on_block(96, 0, [&] {
      const auto i = static_cast<size_t>(thread_number());
      const bool vote = thread_number() < voters;
      any[i] = __syncthreads_or(vote) != 0;
      all[i] = __syncthreads_and(vote) != 0;
      count[i] = __syncthreads_count(vote);
    });
    EXPECT_EQ(any, std::vector<int>(96, voters > 0));
    EXPECT_EQ(all, std::vector<int>(96, voters == 96));
    EXPECT_EQ(count, std::vector<int>(96, voters));
  }
}

// A vote is read after other threads may have begun the next one.
TEST(Barrier, LatchesEachVote) {
  std::vector<int> sums(64);
  on_block(64, 0, [&] {
    for (int round = 0; round < 20; ++round)
      sums[static_cast<size_t>(thread_number())] += __syncthreads_count(thread_number() < round);
  });
  EXPECT_EQ(sums, std::vector<int>(64, 190));
}

TEST(Barrier, NamedOnesAreIndependent) {
  std::vector<float> out(128, -1);
  on_block(128, 128 * sizeof(float), [&] {
    auto* shared = reinterpret_cast<float*>(shared_memory());
    const int thread = thread_number(), pair = thread / 64, partner = thread ^ 32;
    // The first pair of warps meets twice as often as the second.
    for (int round = 0; round < (pair == 0 ? 4 : 2); ++round) {
      shared[thread] = static_cast<float>(thread + round);
      named_barrier_sync(1 + pair, 64);
      out[static_cast<size_t>(thread)] = shared[partner];
      named_barrier_sync(1 + pair, 64);
    }
  });
  for (int thread = 0; thread < 128; ++thread)
    EXPECT_EQ(out[static_cast<size_t>(thread)],
              static_cast<float>((thread ^ 32) + (thread < 64 ? 3 : 1)));
}

TEST(Barrier, OfDisjointLanesMayBeUnderWayAtOnce) {
  std::vector<float> out(32);
  on_block(32, 32 * sizeof(float), [&] {
    auto* shared = reinterpret_cast<float*>(shared_memory());
    const int lane = thread_number();
    const unsigned mask = lane % 2 ? 0xaaaaaaaau : 0x55555555u;
    shared[lane] = static_cast<float>(lane);
    __syncwarp(mask);
    out[static_cast<size_t>(lane)] = shared[(lane + 2) % 32];
  });
  for (int lane = 0; lane < 32; ++lane)
    EXPECT_EQ(out[static_cast<size_t>(lane)], static_cast<float>((lane + 2) % 32));
}

TEST(Barrier, ADeadlockNamesWhoWaitsForWhat) {
  const std::string report = fault_of(64, 0, [] {
    if (threadIdx.x < 32) named_barrier_sync(3, 64);
  });
  EXPECT_NE(report.find("deadlock"), std::string::npos) << report;
  EXPECT_NE(report.find("32 threads from 0 on wait for named barrier at test_emulation.cpp"),
            std::string::npos)
      << report;
  EXPECT_NE(fault_of(64, 0, [] { named_barrier_sync(16, 64); }), "");
  EXPECT_NE(fault_of(64, 0, [] { named_barrier_sync(1, 40); }), "");
}

TEST(Barrier, ABlockRunsAfterAFaultyOne) {
  EXPECT_NE(fault_of(64, 64,
                     [] {
                       if (threadIdx.x == 1) __syncthreads();
                     }),
            "");
  std::vector<int> counts(64);
  on_block(64, 64, [&] { counts[static_cast<size_t>(thread_number())] = __syncthreads_count(1); });
  EXPECT_EQ(counts, std::vector<int>(64, 64));
}

// ---- warps ----

// PTX ISA, shfl: the source of a lane for each mode, segment by segment.
int source_lane(emulation::Shuffle mode, int lane, int argument, int width) {
  const int first = lane / width * width, last = first + width - 1;
  switch (mode) {
    case emulation::Shuffle::index:
      return first + argument % width;
    case emulation::Shuffle::up:
      return lane - argument < first ? lane : lane - argument;
    case emulation::Shuffle::down:
      return lane + argument > last ? lane : lane + argument;
    default:
      return (lane ^ argument) > last ? lane : lane ^ argument;
  }
}

template <class T>
void expect_shuffles() {
  using emulation::Shuffle;
  for (int width : {32, 16, 8, 4, 2})
    for (int argument : {0, 1, 3, 7, 13, 31}) {
      std::vector<T> out[4];
      for (std::vector<T>& lanes : out) lanes.resize(32);
      on_block(32, 0, [&] {
        const auto i = static_cast<size_t>(thread_number());
        const T value = static_cast<T>(100 + thread_number());
        const auto delta = static_cast<unsigned>(argument);
        out[0][i] = __shfl_sync(kFullWarp, value, argument, width);
        out[1][i] = __shfl_up_sync(kFullWarp, value, delta, width);
        out[2][i] = __shfl_down_sync(kFullWarp, value, delta, width);
        out[3][i] = __shfl_xor_sync(kFullWarp, value, argument, width);
      });
      for (int mode = 0; mode < 4; ++mode)
        for (int lane = 0; lane < 32; ++lane)
          EXPECT_EQ(
              out[mode][static_cast<size_t>(lane)],
              static_cast<T>(100 + source_lane(static_cast<Shuffle>(mode), lane, argument, width)))
              << "mode " << mode << " lane " << lane << " of " << width << " by " << argument;
    }
}

TEST(Warp, ShufflesFloats) { expect_shuffles<float>(); }
TEST(Warp, ShufflesDoubles) { expect_shuffles<double>(); }
TEST(Warp, ShufflesIntegers) { expect_shuffles<int64_t>(); }

TEST(Warp, Votes) {
  std::vector<unsigned> ballot(40);
  std::vector<int> any(40), all(40);
  // The second warp has eight lanes; the full mask means those that there are.
  on_block(40, 0, [&] {
    const auto i = static_cast<size_t>(thread_number());
    ballot[i] = __ballot_sync(kFullWarp, thread_number() % 3 == 0);
    any[i] = __any_sync(kFullWarp, thread_number() == 33);
    all[i] = __all_sync(kFullWarp, thread_number() >= 32);
  });
  for (size_t i = 0; i < 40; ++i) {
    unsigned expected = 0;
    for (unsigned thread = i < 32 ? 0 : 32; thread < (i < 32 ? 32u : 40u); ++thread)
      if (thread % 3 == 0) expected |= 1u << thread % 32;
    EXPECT_EQ(ballot[i], expected);
    EXPECT_EQ(any[i], i >= 32);
    EXPECT_EQ(all[i], i >= 32);
  }
}

TEST(Warp, AnExitedLaneIsNotWaitedForButCannotBeRead) {
  int sum = 0;
  on_block(32, 0, [&] {
    if (threadIdx.x >= 16) return;
    const int ones = __popc(__ballot_sync(kFullWarp, 1));
    if (threadIdx.x == 0) sum = ones;
  });
  EXPECT_EQ(sum, 16);
  EXPECT_NE(fault_of(32, 0,
                     [] {
                       if (threadIdx.x < 16) __shfl_xor_sync(kFullWarp, 1, 16);
                     }),
            "");
}

// ---- memory ----

TEST(Memory, AtomicsOfManyBlocksAddUp) {
  float float_sum = 0;
  int int_sum = 0, largest = -1, owner = -1;
  const std::function<void()> body = [&] {
    const int number = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
    atomicAdd(&float_sum, static_cast<float>(number));
    atomicAdd(&int_sum, number);
    atomicMax(&largest, number);
    if (number == 77) atomicExch(&owner, 5);
    if (number == 99) atomicCAS(&owner, 4, 6);  // never 4
  };
  launch(run_block, dim3(8), dim3(32), 0, nullptr, &body);
  EXPECT_EQ(int_sum, 255 * 128);
  EXPECT_EQ(float_sum, 255 * 128);
  EXPECT_EQ(largest, 255);
  EXPECT_EQ(owner, 5);
}

TEST(Memory, ASpinLoopLetsTheOthersGoOn) {
  int flag = 0, seen = 0;
  on_block(64, 0, [&] {
    if (threadIdx.x == 0) {
      while (atomicAdd(&flag, 0) == 0) spin_pause();
      seen = 1;
    } else if (threadIdx.x == 63) {
      atomicExch(&flag, 1);
    }
  });
  EXPECT_EQ(seen, 1);
}

TEST(Memory, AsyncCopiesArriveAtTheirWaitAndNoSooner) {
  std::vector<uint4> source(3);
  for (unsigned i = 0; i < 3; ++i) source[i] = {i, i + 10, i + 20, i + 30};
  std::vector<unsigned> seen(3 * 3);
  emulation::reset_counters();
  on_block(1, 3 * sizeof(uint4), [&] {
    auto* target = reinterpret_cast<uint4*>(shared_memory());
    for (int i = 0; i < 3; ++i) target[i] = {};
    const auto look = [&](size_t time) {
      for (size_t i = 0; i < 3; ++i) seen[time * 3 + i] = target[i].y;
    };
    async_copy_16(target, &source[0], true);
    async_copy_commit();
    async_copy_16(target + 1, &source[1], true);
    async_copy_16(target + 2, nullptr, false);
    async_copy_commit();
    look(0);
    async_copy_wait<1>();
    look(1);
    async_copy_wait<0>();
    look(2);
  });
  EXPECT_EQ(seen, (std::vector<unsigned>{~0u, ~0u, ~0u, 10, ~0u, ~0u, 10, 11, 0}));
  EXPECT_EQ(emulation::counters().async_bytes, 2 * sizeof(uint4));
}

TEST(Memory, CountsGlobalBytes) {
  std::vector<float4> in(32), out(32);
  emulation::reset_counters();
  on_block(32, 0, [&] {
    const float4 loaded = global_load(&in[threadIdx.x]);
    global_store(&out[threadIdx.x], loaded);
    global_store(&out[threadIdx.x].x, __ldg(&in[0].x));
  });
  EXPECT_EQ(emulation::counters().load_bytes, 32u * (16 + 4));
  EXPECT_EQ(emulation::counters().store_bytes, 32u * (16 + 4));
  EXPECT_EQ(emulation::counters().blocks, 1u);
}

// ---- numbers ----

using testing_latte::HalfFormat;
using testing_latte::kBfloat16;
using testing_latte::kFloat16;

// Every code decodes to its value; every value, and the points between two, encode to nearest even.
template <class Encode, class Decode>
void expect_format(const HalfFormat& format, Encode encode, Decode decode) {
  for (int code = 0; code < 1 << 16; ++code) {
    const double value = format.decode(static_cast<uint16_t>(code));
    const float decoded = decode(static_cast<uint16_t>(code));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(decoded)) << code;
      EXPECT_TRUE(std::isnan(format.decode(encode(decoded)))) << code;
      continue;
    }
    ASSERT_EQ(decoded, value) << code;
    ASSERT_EQ(encode(decoded), code);
    const double next = format.decode(static_cast<uint16_t>(code + 1));
    if (!std::isfinite(value) || !std::isfinite(next)) continue;
    for (double part : {0.25, 0.5, 0.75}) {
      const double between = value + part * (next - value);
      ASSERT_EQ(encode(static_cast<float>(between)), format.encode(between)) << between;
    }
  }
  for (double beyond : {1e30, -1e30, 65519.0, 65520.0, 3.4e38, 1e-30, -1e-45})
    EXPECT_EQ(encode(static_cast<float>(beyond)), format.encode(static_cast<float>(beyond)));
}

TEST(Numbers, Bfloat16) {
  expect_format(
      kBfloat16, [](float x) { return __float2bfloat16_rn(x).code; },
      [](uint16_t code) { return __bfloat162float({code}); });
}

TEST(Numbers, Float16) {
  expect_format(
      kFloat16, [](float x) { return __float2half_rn(x).code; },
      [](uint16_t code) { return __half2float({code}); });
}

TEST(Numbers, Tf32RoundsToTenBitsAndSplitsExactly) {
  EXPECT_EQ(__uint_as_float(to_tf32(1 + 0x1p-11f)), 1 + 0x1p-10f);  // a tie, away from zero
  EXPECT_EQ(__uint_as_float(to_tf32(-1 - 0x1p-12f)), -1);
  EXPECT_EQ(__uint_as_float(to_tf32(-INFINITY)), -INFINITY);
  EXPECT_TRUE(std::isnan(__uint_as_float(to_tf32(NAN))));
  const float x = 1.2345678f, high = __uint_as_float(to_tf32(x)),
              low = __uint_as_float(to_tf32(x - high));
  EXPECT_LE(std::abs(x - high - low), 0x1p-22f);
}

TEST(Numbers, PackPutsTheFirstInTheLowerHalf) {
  EXPECT_EQ(pack<__nv_bfloat16>(1.0f, -2.0f), 0xc0003f80u);
  EXPECT_EQ(pack<__half>(1.0f, -2.0f), 0xc0003c00u);
}

TEST(Numbers, TheLesserAndTheGreaterIgnoreNaN) {
  EXPECT_EQ(::max(NAN, 2.0f), 2.0f);
  EXPECT_EQ(::min(2.0f, NAN), 2.0f);
  EXPECT_EQ(::min(int64_t{1} << 40, 3), 3);
  EXPECT_EQ(exp2_approx(-INFINITY), 0.0f);
}

}  // namespace
