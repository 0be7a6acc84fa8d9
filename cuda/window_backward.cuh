// SPDX-License-Identifier: Apache-2.0
// The gradient of window attention: with the weights recomputed from the saved log of the sum,
//   w_ts = exp(logit_ts - log_sum_t)     ds_ts = w_ts (share_t v_s . dy_t - delta_t)
//   dq_t = sum_s ds_ts k_s     dk_s = sum_t ds_ts q_t     dv_s = sum_t share_t w_ts dy_t
// ds times the scale and the slope of a soft cap, 1 - (capped logit / softcap)^2; share is that of
// a gate, 1 without one.
//
// One kernel for each side: a block owns 64 queries and streams keys past them for dq, or owns 64
// keys and streams the queries of all heads of their group, in order, for dk and dv. No atomics:
// every sum has one order. Sinks are owned as keys, but their queries are all of the sequence:
// these are cut into pieces, whose sums a last kernel adds.
#pragma once

#include "cuda/window.cuh"

namespace latte::cuda {

template <class Shape, Side kSide>
class WindowGradientBlock {
 public:
  using E = typename Shape::Element;
  using Scores = typename Shape::Scores;
  using Product = typename Shape::Product;
  static constexpr int kStride = Shape::kStride, kStreamed = Shape::kStreamed;
  static constexpr bool kOwnsKeys = kSide == Side::keys;
  // Channels of a gradient that the block sums.
  static constexpr int kSlice = kOwnsKeys ? gradient_slice(Shape::C) : Shape::C;

 protected:
  __device__ __forceinline__ WindowGradientBlock(const WindowArgs& a, const WindowTile& w,
                                                 int channel)
      : a_(a), w_(w), row_(warp_id() * 16), channel_(channel) {}

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int d = 0; d < kSlice / 16; ++d) first_[d] = Tile();
    if constexpr (kOwnsKeys)
#pragma unroll
      for (int d = 0; d < kSlice / 16; ++d) second_[d] = Tile();
  }

  // The 16 own rows of a warp meet the columns of a stage that `seen` has. `query` and `key` are
  // the first of the block's tile; kSinks: keys are sinks.
  template <bool kSinks>
  __device__ __forceinline__ void meet(const WindowStage<Shape>& s, const Band& band, int64_t query,
                                       int64_t key) {
    const Clip seen = kSinks ? Clip{0, band.columns} : band.of_rows(row_, row_ + 15);
    const bool masked = kSinks || a_.key_mask || !band.is_whole(row_, kStreamed);
#pragma unroll 1
    for (int j = seen.begin / 16 * 16; j < seen.end; j += 16) {
      Tile weights, slopes;
      multiply_rows(s, j, weights, slopes);
      weigh<kSinks>(s, band, j, query, key, masked, weights, slopes);
      const auto of_slopes = Product::left(slopes);
      add(first_, a_.key_dim, of_slopes, s.first + j * kStride);
      if constexpr (kOwnsKeys) add(second_, a_.dim, Product::left(weights), s.second + j * kStride);
    }
  }

  // Logits, and products of values and gradients. Channels beyond either width are zeros.
  __device__ __forceinline__ void multiply_rows(const WindowStage<Shape>& s, int j, Tile& logits,
                                                Tile& products) const {
    const int width = a_.key_dim > a_.dim ? a_.key_dim : a_.dim;
#pragma unroll Shape::kUnroll
    for (int c = 0; c < width; c += 16) {
      Scores::multiply(logits, Scores::left_rows(m_.own(0) + row_ * kStride + c, kStride),
                       Scores::right_columns(s.first + j * kStride + c, kStride));
      Scores::multiply(products, Scores::left_rows(m_.own(1) + row_ * kStride + c, kStride),
                       Scores::right_columns(s.second + j * kStride + c, kStride));
    }
  }

  // Logits to w, products to ds.
  template <bool kSinks>
  __device__ __forceinline__ void weigh(const WindowStage<Shape>& s, const Band& band, int j,
                                        int64_t query, int64_t key, bool masked, Tile& weights,
                                        Tile& slopes) const {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int half = e % 4 / 2, own = row_ + tile_row(e % 4),
                column = j + tile_column(e / 4, e % 4);
      float &x = weights.c[e / 4][e % 4], &slope = slopes.c[e / 4][e % 4];
      float log_sum = log_sum_[half], delta = delta_[half], share = share_[half];
      if constexpr (kOwnsKeys)
        log_sum = s.row(column).log_sum, delta = s.row(column).delta, share = s.row(column).share;
      // Of a query that sees no key, and of one that is not there, the log of the sum is -inf.
      bool visible = log_sum != -kInfinity;
      if (masked && visible) {
        if constexpr (kSinks) {
          visible = sees_sink(a_, w_, query + (kOwnsKeys ? column : own),
                              key + (kOwnsKeys ? own : column));
        } else {
          visible = band.of_rows(own, own).holds(column) &&
                    (kOwnsKeys ? used_[half] : !a_.key_mask || s.row(column).used);
        }
      }
      x = capped(a_, a_.scale * x);
      const float inner = a_.softcap > 0 ? 1 - x * x / (a_.softcap * a_.softcap) : 1;
      const float w = visible ? weight<Scores>(x - log_sum) : 0;
      slope = visible ? w * (share * slope - delta) * inner : 0;
      x = share * w;
    }
  }

  __device__ __forceinline__ void add(Tile (&sums)[kSlice / 16], int width,
                                      const typename Product::Left& left, const E* rows) {
#pragma unroll
    for (int d = 0; d < kSlice / 16; ++d)
      if (channel_ + 16 * d < width)
        Product::multiply(sums[d], left, Product::right_rows(rows + channel_ + 16 * d, kStride));
  }

  __device__ __forceinline__ void store(const Slice& to, int64_t rows, Tile (&sums)[kSlice / 16],
                                        float scale) {
    const Target target(to);
#pragma unroll
    for (int d = 0; d < kSlice / 16; ++d) {
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[d].c[e / 4][e % 4] *= scale;
      target.store_tile(0, 16 * d, rows, sums[d]);
    }
  }

  const WindowArgs& a_;
  const WindowTile w_;
  const WindowMemory<Shape> m_;
  const int row_, channel_;
  // Of the lane's two own rows: queries, or whether they are keys to be seen.
  float log_sum_[2] = {}, delta_[2] = {}, share_[2] = {1, 1};
  bool used_[2] = {};
  Tile first_[kSlice / 16], second_[kOwnsKeys ? kSlice / 16 : 1];
};

template <class Shape>
class WindowQueryGradient : WindowGradientBlock<Shape, Side::queries> {
  using Base = WindowGradientBlock<Shape, Side::queries>;
  using Base::a_, Base::kStreamed, Base::m_, Base::row_, Base::w_;
  using typename Base::E;

 public:
  __device__ __forceinline__ WindowQueryGradient(const WindowArgs& a, const WindowTile& w)
      : Base(a, w, 0) {}

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t t = w_.begin + row_ + tile_row(2 * r), at = w_.first + t;
      const bool there = t < w_.tokens;
      this->log_sum_[r] =
          there ? load_number<float>(a_.log_sum, w_.batch, w_.head, at) : -kInfinity;
      this->delta_[r] = there ? load_number<float>(a_.delta, w_.batch, w_.head, at) : 0;
      if (a_.share.data && there)
        this->share_[r] = load_number<float>(a_.share, w_.batch, w_.head, at);
    }
    walk(a_.q, a_.dq, window_keys<Shape>(a_, w_));
    if (a_.sinks > 0) walk(a_.q_sink, a_.dq_sink, all_sinks<Shape>(a_, w_));
  }

 private:
  // The gradient of the queries `q` from the keys, or sinks.
  template <bool kSinks>
  __device__ __forceinline__ void walk(const HeadRows& q, const HeadRows& dq,
                                       const KeyStream<Shape, kSinks>& keys) {
    this->clear();
    if (keys.tiles() > 0) {
      const auto is_query = [&](int row) { return w_.begin + row < w_.tokens; };
      load_rows<E, Shape::C, kOwnRows>(m_.own(0), own_rows(q, a_.key_dim), 0, is_query);
      load_rows<E, Shape::C, kOwnRows>(m_.own(1), own_rows(a_.dy, a_.dim), 0, is_query);
      keys.load(0);
      walk_chunks(
          keys.tiles(), a_.stages, [&](int64_t tile) { keys.load(tile); },
          [&](int64_t tile) {
            this->template meet<kSinks>(m_.stage(stage_of(tile, a_.stages)), keys.band(tile),
                                        w_.begin, keys.key(tile));
            __syncthreads();
          });
    }
    Slice to = own_rows(dq, a_.key_dim);
    to.first += row_ * dq.stride_t;
    this->store(to, w_.tokens - w_.begin - row_, this->first_, a_.scale);
  }
  __device__ __forceinline__ Slice own_rows(const HeadRows& rows, int channels) const {
    return rows_from(rows, w_.batch, w_.head, w_.first + w_.begin, channels);
  }
};

// `kSinks`: a block owns sinks, and meets a piece of the sequence's queries.
template <class Shape, bool kSinks>
class WindowKeyGradient : WindowGradientBlock<Shape, Side::keys> {
  using Base = WindowGradientBlock<Shape, Side::keys>;
  using Base::a_, Base::channel_, Base::kStreamed, Base::m_, Base::row_, Base::w_;
  using typename Base::E;

 public:
  __device__ __forceinline__ WindowKeyGradient(const WindowArgs& a, const WindowTile& w,
                                               int channel, int piece)
      : Base(a, w, channel), piece_(piece) {
    if constexpr (kSinks) {
      const int64_t size = ceil_div(w_.tokens, a_.pieces);
      from_ = least(piece * size, w_.tokens), to_ = least(from_ + size, w_.tokens);
    } else {
      const int64_t last = least(w_.begin + kOwnRows, w_.keys(a_));
      from_ = most(w_.begin - a_.past - a_.after, 0);
      to_ = least(last - a_.past + a_.before, w_.tokens);
    }
  }

  __device__ __forceinline__ void run() {
    const int64_t tiles = ceil_div(to_ - from_, kStreamed);
    const int group = a_.heads / a_.kv_heads;
    if (tiles > 0) {
      load_own();
      const auto load = [&](int64_t i) {
        this->load(i, static_cast<int>(i / tiles), from_ + i % tiles * kStreamed);
      };
      load(0);
      walk_chunks(group * tiles, a_.stages, load, [&](int64_t i) {
        const int64_t query = from_ + i % tiles * kStreamed;
        const Band band = {w_.begin - a_.past - query, a_.after, a_.before,
                           static_cast<int>(least(kStreamed, to_ - query))};
        this->template meet<kSinks>(m_.stage(stage_of(i, a_.stages)), band, query, w_.begin);
        __syncthreads();
      });
    }
    kSinks ? store_sums() : store_rows();
  }

 private:
  __device__ __forceinline__ Slice own_rows(const HeadRows& rows, int channels, int channel,
                                            int row) const {
    return rows_from(rows, kSinks ? w_.sequence : w_.batch, w_.head,
                     (kSinks ? 0 : w_.first_key(a_)) + w_.begin + row, channels, channel);
  }

  __device__ __forceinline__ void load_own() {
    const auto is_used = [&](int row) {
      return kSinks ? w_.begin + row < a_.sinks : is_key(a_, w_, w_.begin + row);
    };
    load_rows<E, Shape::C, kOwnRows>(
        m_.own(0), own_rows(kSinks ? a_.k_sink : a_.k, a_.key_dim, 0, 0), 0, is_used);
    load_rows<E, Shape::C, kOwnRows>(m_.own(1), own_rows(kSinks ? a_.v_sink : a_.v, a_.dim, 0, 0),
                                     0, is_used);
#pragma unroll
    for (int r = 0; r < 2; ++r) this->used_[r] = is_used(row_ + tile_row(2 * r));
  }

  // Queries from `query` on of head `g` of the group.
  __device__ __forceinline__ void load(int64_t tile, int g, int64_t query) const {
    const WindowStage<Shape> s = m_.stage(stage_of(tile, a_.stages));
    const int head = w_.head * (a_.heads / a_.kv_heads) + g;
    const int64_t first = w_.first + query;
    const auto is_query = [&](int row) { return query + row < to_; };
    load_rows<E, Shape::C, kStreamed>(
        s.first, rows_from(kSinks ? a_.q_sink : a_.q, w_.batch, head, first, a_.key_dim), 0,
        is_query);
    load_rows<E, Shape::C, kStreamed>(s.second, rows_from(a_.dy, w_.batch, head, first, a_.dim), 0,
                                      is_query);
    if (threadIdx.x < kStreamed) {
      const int row = static_cast<int>(threadIdx.x);
      const bool there = is_query(row);
      StreamedRow& to = s.row(row);
      to.log_sum = there ? load_number<float>(a_.log_sum, w_.batch, head, first + row) : -kInfinity;
      to.delta = there ? load_number<float>(a_.delta, w_.batch, head, first + row) : 0;
      to.share =
          there && a_.share.data ? load_number<float>(a_.share, w_.batch, head, first + row) : 1;
    }
    async_copy_commit();
  }

  __device__ __forceinline__ void store_rows() {
    const int64_t rows = w_.keys(a_) - w_.begin - row_;
    if (channel_ < a_.key_dim)
      this->store(own_rows(a_.dk, a_.key_dim, channel_, row_), rows, this->first_, a_.scale);
    if (channel_ >= a_.dim) return;
    if (a_.more_dv.data) add_more(rows);
    this->store(own_rows(a_.dv, a_.dim, channel_, row_), rows, this->second_, 1);
  }
  // May be dv itself: every lane reads what it alone writes afterwards.
  __device__ __forceinline__ void add_more(int64_t rows) {
    const Slice from = own_rows(a_.more_dv, a_.dim, channel_, row_);
    const float* const data = static_cast<const float*>(a_.more_dv.data) + from.first;
#pragma unroll
    for (int d = 0; d < Base::kSlice / 16; ++d)
      for_each_element(this->second_[d], [&](int row, int column, float& x) {
        const int c = 16 * d + column;
        if (row < rows && c < from.width)
          x += global_load(data + row * a_.more_dv.stride_t + c * a_.more_dv.stride_c);
      });
  }
  __device__ __forceinline__ void store_sums() {
    const int64_t width = a_.key_dim + a_.dim;
    float* const sums =
        a_.sink_sums +
        (((piece_ * a_.sequences.count() + w_.sequence) * a_.kv_heads + w_.head) * a_.sinks +
         w_.begin + row_) *
            width;
#pragma unroll
    for (int d = 0; d < Base::kSlice / 16; ++d) {
      const auto store = [&](Tile& tile, int64_t offset, int channels, float scale) {
        for_each_element(tile, [&](int row, int column, float& x) {
          const int c = channel_ + 16 * d + column;
          if (w_.begin + row_ + row < a_.sinks && c < channels)
            global_store(sums + row * width + offset + c, scale * x);
        });
      };
      store(this->first_[d], 0, a_.key_dim, a_.scale);
      store(this->second_[d], a_.key_dim, a_.dim, 1);
    }
  }

  const int piece_;
  int64_t from_, to_;
};

template <class Shape>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    window_query_gradient(const __grid_constant__ WindowArgs a) {
  WindowTile w;
  if (find_tile<Side::queries>(a, blockIdx.x, a.heads, w)) WindowQueryGradient<Shape>(a, w).run();
}

template <class Shape>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    window_key_gradient(const __grid_constant__ WindowArgs a) {
  const int channel = static_cast<int>(blockIdx.x % a.slices) * gradient_slice(Shape::C);
  WindowTile w;
  if (find_tile<Side::keys>(a, blockIdx.x / a.slices, a.kv_heads, w))
    WindowKeyGradient<Shape, false>(a, w, channel, 0).run();
}

// Blocks: sequences, key/value heads, tiles of sinks, pieces, slices of channels.
template <class Shape>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    window_sink_gradient(const __grid_constant__ WindowArgs a) {
  int64_t block = blockIdx.x;
  const int channel = static_cast<int>(block % a.slices) * gradient_slice(Shape::C);
  block /= a.slices;
  const int piece = static_cast<int>(block % a.pieces);
  block /= a.pieces;
  const int64_t tiles = ceil_div(a.sinks, kOwnRows), tile = block % tiles;
  block /= tiles;
  const int head = static_cast<int>(block % a.kv_heads);
  WindowTile w = sequence_tile(a, block / a.kv_heads, head, a.kv_heads);
  w.begin = tile * kOwnRows;
  WindowKeyGradient<Shape, true>(a, w, channel, piece).run();
}

}  // namespace latte::cuda
