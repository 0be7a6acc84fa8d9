// SPDX-License-Identifier: Apache-2.0
// What the kernels of window attention share: arguments, the tile of a block, who sees whom, and
// the layout of shared memory.
#pragma once

#include "cuda/window_gate.cuh"
#include "cuda/window_plan.h"

namespace latte::cuda {

struct WindowArgs {
  HeadRows q, k, v, q_sink, k_sink, v_sink;
  HeadRows y, wide;                           // forward
  HeadRows dy, dq, dk, dv, dq_sink, more_dv;  // backward; more_dv is added to dv
  View log_sum, delta, share;                 // (B,H,T) float32; of the last two backward
  float* sink_sums = nullptr;                 // (pieces,N,Hk,sinks,Dk+D)
  GateArgs gate;
  HeadRows global;  // (B,H,T,D) float32; in: the latents' output, out: the sum of both
  const bool* key_mask = nullptr;
  int64_t mask_stride_b = 0, mask_stride_s = 0;
  const int64_t *sink_position = nullptr, *start = nullptr;
  int64_t position_stride_n = 0, position_stride_i = 0, start_stride = 0;
  Sequences sequences;
  int64_t slots = 1;  // tiles of a batch row
  int heads = 0, kv_heads = 0, key_dim = 0, dim = 0, sinks = 0;
  // A query sees the keys from `before` before its own to `after` behind it, and the sinks that are
  // `reach` away: the window, which `before` and `after` cut to the keys that there are.
  int64_t past = 0, before = 0, after = 0, reach = 1;
  bool causal = true;
  float scale = 1, softcap = 0;  // softcap 0: none
  int pieces = 1, slices = 1;    // of the queries of sinks; of the channels of dk and dv
  int stages = 1;
};

// The queries of a sequence, and the first row that a block owns of these or of the keys.
struct WindowTile {
  int sequence, batch, head, kv_head;
  int64_t first, tokens, begin;  // first: row of q

  __device__ __forceinline__ int64_t keys(const WindowArgs& a) const { return tokens + a.past; }
  __device__ __forceinline__ int64_t first_key(const WindowArgs& a) const {
    return a.sequences.is_packed() ? first + sequence * a.past : 0;
  }
};

__device__ __forceinline__ WindowTile sequence_tile(const WindowArgs& a, int64_t sequence, int head,
                                                    int heads) {
  const Range range = a.sequences.range(sequence);
  return {static_cast<int>(sequence),
          static_cast<int>(range.batch),
          head,
          head / (heads / a.kv_heads),
          range.first,
          range.tokens,
          0};
}

enum class Side { queries, keys };

// The tile of block `block` of a grid of batch rows, heads and slots. Sequence n of packed ones has
// the slots from (rows before it) / kOwnRows + n on, never fewer than it has tiles. False if the
// slot is empty.
template <Side kSide>
__device__ __forceinline__ bool find_tile(const WindowArgs& a, int64_t block, int heads,
                                          WindowTile& w) {
  const int64_t slot = block % a.slots, head = block / a.slots % heads;
  int64_t low = block / a.slots / heads, first_slot = 0;
  if (a.sequences.is_packed()) {
    const auto slot_of = [&](int64_t n) {
      const int64_t past = kSide == Side::keys ? n * a.past : 0;
      return (a.sequences.range(n).first + past) / kOwnRows + n;
    };
    int64_t high = a.sequences.count();
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (slot_of(middle) <= slot ? low : high) = middle;
    }
    first_slot = slot_of(low);
  }
  w = sequence_tile(a, low, static_cast<int>(head), heads);
  w.begin = (slot - first_slot) * kOwnRows;
  return w.begin >= 0 && w.begin < (kSide == Side::keys ? w.keys(a) : w.tokens);
}

struct Clip {
  int begin, end;
  __device__ __forceinline__ bool holds(int i) const { return i >= begin && i < end; }
  // Some of the 16 columns from i on.
  __device__ __forceinline__ bool meets(int i) const { return i < end && i + 16 > begin; }
};

// Row r of a tile sees the columns shift + r - before to shift + r + after, of `columns`.
struct Band {
  int64_t shift, before, after;
  int columns;

  __device__ __forceinline__ Clip of_rows(int first, int last) const {
    const auto clip = [&](int64_t column) {
      return static_cast<int>(most(least(column, columns), 0));
    };
    return {clip(shift + first - before), clip(shift + last + after + 1)};
  }
  // Every row of the warp's 16 sees every column of a tile of `width`.
  __device__ __forceinline__ bool is_whole(int row, int width) const {
    return columns == width && shift + row + 15 - before <= 0 && shift + row + after >= width - 1;
  }
};

__device__ __forceinline__ bool sees_sink(const WindowArgs& a, const WindowTile& w, int64_t query,
                                          int64_t sink) {
  if (sink >= a.sinks || query >= w.tokens) return false;
  if (!a.sink_position) return true;
  const int64_t position =
      global_load(a.sink_position + w.sequence * a.position_stride_n + sink * a.position_stride_i);
  const int64_t start = a.start ? global_load(a.start + w.sequence * a.start_stride) : 0;
  const uint64_t at = static_cast<uint64_t>(start) + static_cast<uint64_t>(query);
  return is_distant(static_cast<int64_t>(at), position, a.reach, a.causal);
}

__device__ __forceinline__ bool is_key(const WindowArgs& a, const WindowTile& w, int64_t key) {
  return key < w.keys(a) &&
         (!a.key_mask ||
          a.key_mask[w.batch * a.mask_stride_b + (w.first_key(a) + key) * a.mask_stride_s]);
}

// Rows of one head from row `first` on, and channel `channel` of `channels`.
__device__ __forceinline__ Slice rows_from(const HeadRows& rows, int64_t batch, int head,
                                           int64_t first, int channels, int channel = 0) {
  return {rows,
          batch * rows.stride_b + head * rows.stride_h + first * rows.stride_t +
              channel * rows.stride_c,
          channels - channel};
}

// Sizes of a kernel whose blocks own kOwned arrays of kOwnRows rows of kChannels elements E, and
// stream two of them past these.
template <class E, int kChannels, int kOwned>
struct WindowShape {
  using Element = E;
  // Factors that are inputs need no more bits than these have.
  using Scores = std::conditional_t<std::is_same_v<E, float>, Tf32Product<3>, HalfProduct<E>>;
  // Slopes of float16 do not fit in float16.
  using Product = typename ProductOf<E>::type;
  static constexpr int C = kChannels, kStride = C + kPadding<E>;
  static constexpr WindowBytes kBytes = window_bytes(sizeof(E), C, kOwned);
  static constexpr int kStreamed = kBytes.streamed;
  // Steps of 16 channels whose operands are on their way together, where registers allow: three
  // products of float32 are work enough for one, and 256 channels fill the registers.
  static constexpr int kUnroll = Scores::kExact || C == 256 ? 1 : 2;
};

// What is known of a streamed row: of a query, or whether it is a key to be seen.
struct StreamedRow {
  float log_sum, delta, share;
  bool used;
};
static_assert(sizeof(StreamedRow) <= kRowPadding);

template <class Shape>
struct WindowStage {
  using E = typename Shape::Element;
  E *first, *second;  // keys and values, or queries and gradients of their outputs

  // In the padding behind the row's channels.
  __device__ __forceinline__ StreamedRow& row(int i) const {
    return *reinterpret_cast<StreamedRow*>(first + i * Shape::kStride + Shape::C);
  }
};

template <class Shape>
struct WindowMemory {
  using E = typename Shape::Element;
  unsigned char* base = shared_memory();

  __device__ __forceinline__ E* own(int i = 0) const {
    return reinterpret_cast<E*>(base) + i * kOwnRows * Shape::kStride;
  }
  __device__ __forceinline__ WindowStage<Shape> stage(int i) const {
    E* const first = reinterpret_cast<E*>(base + Shape::kBytes.own + i * Shape::kBytes.stage);
    return {first, first + Shape::kStreamed * Shape::kStride};
  }
};

// The keys and values, or sinks, [from, to) that stream past the queries of a tile.
template <class Shape, bool kSinks>
class KeyStream {
 public:
  __device__ __forceinline__ KeyStream(const WindowArgs& a, const WindowTile& w, int64_t from,
                                       int64_t to)
      : a_(a),
        w_(w),
        from_(from),
        to_(to),
        k_(rows_of_head(kSinks ? a.k_sink : a.k, a.key_dim)),
        v_(rows_of_head(kSinks ? a.v_sink : a.v, a.dim)) {}

  __device__ __forceinline__ int64_t tiles() const { return ceil_div(to_ - from_, kStreamed); }
  __device__ __forceinline__ int64_t key(int64_t tile) const { return from_ + tile * kStreamed; }
  __device__ __forceinline__ Band band(int64_t tile) const {
    return {a_.past + w_.begin - key(tile), a_.before, a_.after,
            static_cast<int>(least(kStreamed, to_ - key(tile)))};
  }
  __device__ __forceinline__ void load(int64_t tile) const {
    const WindowStage<Shape> s = m_.stage(stage_of(tile, a_.stages));
    const auto is_used = [&](int row) {
      const int64_t key = this->key(tile) + row;
      return key < to_ && (kSinks || is_key(a_, w_, key));
    };
    load_rows<typename Shape::Element, Shape::C, kStreamed>(s.first, k_, tile * kStreamed, is_used);
    load_rows<typename Shape::Element, Shape::C, kStreamed>(s.second, v_, tile * kStreamed,
                                                            is_used);
    if (!kSinks && a_.key_mask && threadIdx.x < kStreamed)
      s.row(static_cast<int>(threadIdx.x)).used = is_used(static_cast<int>(threadIdx.x));
    async_copy_commit();
  }

 private:
  static constexpr int kStreamed = Shape::kStreamed;

  __device__ __forceinline__ Slice rows_of_head(const HeadRows& rows, int channels) const {
    return rows_from(rows, kSinks ? w_.sequence : w_.batch, w_.kv_head,
                     (kSinks ? 0 : w_.first_key(a_)) + from_, channels);
  }

  const WindowArgs& a_;
  const WindowTile& w_;
  const WindowMemory<Shape> m_;
  const int64_t from_, to_;
  const Slice k_, v_;
};

// The keys that some query of the tile sees.
template <class Shape>
__device__ __forceinline__ KeyStream<Shape, false> window_keys(const WindowArgs& a,
                                                               const WindowTile& w) {
  const int64_t first = a.past + w.begin, last = a.past + least(w.begin + kOwnRows, w.tokens);
  return {a, w, most(first - a.before, 0), least(last + a.after, w.keys(a))};
}
template <class Shape>
__device__ __forceinline__ KeyStream<Shape, true> all_sinks(const WindowArgs& a,
                                                            const WindowTile& w) {
  return {a, w, 0, a.sinks};
}

// Calls f(half, row, column, element) for the lane's elements; `half` of the two rows it has is a
// constant of the unrolled loop, which an index of registers has to be.
template <class F>
__device__ __forceinline__ void for_each_of_rows(Tile& tile, F f) {
#pragma unroll
  for (int e = 0; e < 8; ++e)
    f(e % 4 / 2, tile_row(e % 4), tile_column(e / 4, e % 4), tile.c[e / 4][e % 4]);
}

// softcap tanh(x / softcap), or x without one.
__device__ __forceinline__ float capped(const WindowArgs& a, float logit) {
  return a.softcap > 0 ? a.softcap * tanhf(logit / a.softcap) : logit;
}

}  // namespace latte::cuda
