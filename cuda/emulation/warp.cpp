// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp do together: votes, shuffles and tensor-core products. None of them
// orders memory, neither here nor on the device.
#include <algorithm>
#include <bit>

#include "cuda/emulation/block.h"
#include "cuda/emulation/half_types.h"

namespace latte::emulation {

namespace {

bool has(unsigned mask, int lane) { return mask >> lane & 1; }

// The source lane of PTX's shfl: the lane itself where it would leave its segment.
int shuffle_source(Shuffle mode, int lane, int argument, int width) {
  const int begin = lane & ~(width - 1), end = begin + width;
  switch (mode) {
    case Shuffle::index:
      return begin | (argument & (width - 1));
    case Shuffle::up:
      return lane - argument >= begin ? lane - argument : lane;
    case Shuffle::down:
      return lane + argument < end ? lane + argument : lane;
    case Shuffle::exclusive_or:
      return (lane ^ argument) < end ? lane ^ argument : lane;
  }
  return lane;
}

void shuffle_lanes(Block& block, Thread* lanes, unsigned mask, int variant) {
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!has(mask, lane)) continue;
    const int source =
        shuffle_source(static_cast<Shuffle>(variant), lane, static_cast<int>(lanes[lane].in[1]),
                       static_cast<int>(lanes[lane].in[2]));
    if (source < 0 || source >= kWarp || !has(mask, source))
      block.fault("a shuffle reads a lane that takes no part, number", source);
    lanes[lane].out[0] = lanes[source].in[0];
  }
}

void ballot_lanes(Block&, Thread* lanes, unsigned mask, int) {
  unsigned votes = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if (has(mask, lane) && lanes[lane].in[0]) votes |= 1u << lane;
  for (int lane = 0; lane < kWarp; ++lane)
    if (has(mask, lane)) lanes[lane].out[0] = votes;
}

float decode(Mma kind, uint32_t bits) {
  const auto code = static_cast<uint16_t>(bits);
  switch (kind) {
    case Mma::bfloat16_m16n8k16:
      return __bfloat162float({code});
    case Mma::float16_m16n8k16:
      return __half2float({code});
    case Mma::tf32_m16n8k8:
      return std::bit_cast<float>(bits & ~0x1fffu);  // the device ignores the low 13 bits
  }
  return 0;
}

// Element i of a lane's registers: two to a register in 16-bit types.
float operand(Mma kind, const uint64_t* registers, int i) {
  if (kind == Mma::tf32_m16n8k8) return decode(kind, static_cast<uint32_t>(registers[i]));
  return decode(kind, static_cast<uint32_t>(registers[i / 2] >> (i % 2 * 16)));
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16" and ".m16n8k8": with g = lane / 4 and t = lane % 4,
// A alternates rows g, g + 8 and then steps on in k; B has column g; C has rows g, g + 8.
void mma_lanes(Block& block, Thread* lanes, unsigned mask, int variant) {
  if (mask != kAllLanes) block.fault("mma without all lanes of the warp");
  const auto kind = static_cast<Mma>(variant);
  const int pack = kind == Mma::tf32_m16n8k8 ? 1 : 2, depth = 8 * pack;
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint64_t* in = lanes[lane].in;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4 * pack; ++i) {
      const int tile = i / pack;  // (row half) + 2 (k half)
      a[g + 8 * (tile % 2)][pack * t + i % pack + 4 * pack * (tile / 2)] = operand(kind, in, i);
    }
    for (int i = 0; i < 2 * pack; ++i)
      b[pack * t + i % pack + 4 * pack * (i / pack)][g] = operand(kind, in + 4, i);
    for (int i = 0; i < 4; ++i)
      c[g + 8 * (i / 2)][2 * t + i % 2] = std::bit_cast<float>(static_cast<uint32_t>(in[6 + i]));
  }
  for (int k = 0; k < depth; ++k)
    for (int row = 0; row < 16; ++row)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i)
      lanes[lane].out[i] =
          std::bit_cast<uint32_t>(c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
  ++block.counters.mma;
}

constexpr int kTransposed = 8;  // flag beside the number of matrices

// Matrix m's row r comes from lane 8 m + r; each lane receives one pair of a row, or of a column.
void ldmatrix_lanes(Block& block, Thread* lanes, unsigned mask, int variant) {
  if (mask != kAllLanes) block.fault("ldmatrix without all lanes of the warp");
  const int count = variant & ~kTransposed;
  const bool transposed = variant & kTransposed;
  for (int matrix = 0; matrix < count; ++matrix) {
    const Thread* rows = lanes + 8 * matrix;
    const auto element = [&](int row, int column) {
      return static_cast<uint32_t>(rows[row].in[column / 4] >> (column % 4 * 16)) & 0xffff;
    };
    for (int lane = 0; lane < kWarp; ++lane) {
      const int row = lane / 4, pair = lane % 4 * 2;
      lanes[lane].out[matrix] = transposed ? element(pair, row) | element(pair + 1, row) << 16
                                           : element(row, pair) | element(row, pair + 1) << 16;
    }
    // 32 banks of 4 bytes: rows of 16 bytes collide when they are equal modulo 128 bytes.
    int users[8] = {};
    for (int row = 0; row < 8; ++row) ++users[rows[row].in[2] / 16 % 8];
    block.counters.ldmatrix_conflicts +=
        static_cast<uint64_t>(*std::max_element(users, users + 8) - 1);
  }
  block.counters.ldmatrix += static_cast<uint64_t>(count);
}

}  // namespace

uint64_t shuffle(Shuffle mode, unsigned mask, uint64_t value, int argument, int width,
                 CallSite site) {
  Block& block = running_block();
  Thread& me = block.current();
  me.site = site;
  if (width <= 0 || width > kWarp || (width & (width - 1)) != 0)
    block.fault("width of a shuffle, expected a power of two up to 32, not", width);
  me.in[0] = value;
  me.in[1] = static_cast<uint64_t>(argument);
  me.in[2] = static_cast<uint64_t>(width);
  block.collective(Wait::shuffle, static_cast<int>(mode), mask, site, shuffle_lanes);
  return me.out[0];
}

unsigned ballot(unsigned mask, bool predicate, CallSite site) {
  Block& block = running_block();
  Thread& me = block.current();
  me.in[0] = predicate;
  block.collective(Wait::ballot, 0, mask, site, ballot_lanes);
  return static_cast<unsigned>(me.out[0]);
}

void mma(Mma kind, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, CallSite site) {
  Block& block = running_block();
  Thread& me = block.current();
  for (int i = 0; i < 4; ++i) me.in[i] = a[i];
  me.in[4] = b0;
  me.in[5] = b1;
  for (int i = 0; i < 4; ++i) me.in[6 + i] = std::bit_cast<uint32_t>(d[i]);
  block.collective(Wait::mma, static_cast<int>(kind), kAllLanes, site, mma_lanes);
  for (int i = 0; i < 4; ++i) d[i] = std::bit_cast<float>(static_cast<uint32_t>(me.out[i]));
}

bool ldmatrix_reads(int count) { return running_block().current().lane() < 8 * count; }

void ldmatrix(uint32_t* result, int count, bool transposed, const void* address, uint4 row,
              CallSite site) {
  Block& block = running_block();
  Thread& me = block.current();
  me.in[0] = row.x | uint64_t{row.y} << 32;
  me.in[1] = row.z | uint64_t{row.w} << 32;
  me.in[2] = reinterpret_cast<uintptr_t>(address);
  block.collective(Wait::ldmatrix, count | (transposed ? kTransposed : 0), kAllLanes, site,
                   ldmatrix_lanes);
  for (int i = 0; i < count; ++i) result[i] = static_cast<uint32_t>(me.out[i]);
}

void check_ldmatrix_row(const void* address, CallSite site) {
  Block& block = running_block();
  block.current().site = site;
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) block.fault("misaligned row of ldmatrix");
  if (!block.in_shared(address, 16)) block.fault("ldmatrix outside of shared memory");
}

}  // namespace latte::emulation
