// SPDX-License-Identifier: Apache-2.0
// The one microkernel: unnormalised causal linear attention on a register tile of the state,
//
//   S[a,b] += X[t,a] Y[t,b]        O[t,b] (+)= sum_a G[t,a] S[a,b]        t forward or backward,
//
// or one of the two halves. Forward, backward and bidirectional attention are calls of it with
// different operands. It keeps a tile of S in registers over a whole chunk of tokens, so a token
// costs exactly 4 A B operations; the chunked matrix form costs 4 A B + C (A + B) and measured
// 1.2 to 1.45 times slower with a microkernel of the same quality.
//
// Operands are streams of blocks (Stream). Packed, every one of them is contiguous:
//   X and G  [row block][token][X (R) | G (R)]   one vector per token and block of R = lanes/2 rows
//   Y, O     [column block][token][2 vectors]
//   S        [column block][row block][R][2 vectors]
// so that the scan reaches 98-100 % of the FMA peak; but rows of the caller's tensor are read where
// they are if they do not share L1 sets (heuristics.h): packing values cost 18 of 350 cycles per
// token at L = D = 64.
#pragma once

#include "cpu/heuristics.h"
#include "cpu/rows.h"

namespace latte::LATTE_ISA {

using cpu::kChunk;

template <class T>
inline constexpr int64_t kRows = kLanes<T> / 2;
template <class T>
inline constexpr int64_t kColumns = kLanes<T> * 2;

// Block strides: one line more than the block, so that one token's blocks do not share L1 sets.
template <class T>
inline constexpr int64_t kRowBlock = kChunk * kLanes<T> + 64 / sizeof(T);
template <class T>
inline constexpr int64_t kColumnBlock = kChunk * kColumns<T> + 64 / sizeof(T);

template <class T>
LATTE_INLINE int64_t row_blocks(int64_t a) {
  return (a + kRows<T> - 1) / kRows<T>;
}
template <class T>
LATTE_INLINE int64_t column_blocks(int64_t b) {
  return (b + kColumns<T> - 1) / kColumns<T>;
}

// Row blocks that hold whole vectors of X and G: what the packing loops write.
template <class T>
LATTE_INLINE int64_t paired_size(int64_t a) {
  return round_up<T>(a) / kRows<T> * kRowBlock<T>;
}
template <class T>
LATTE_INLINE int64_t blocked_size(int64_t b) {
  return column_blocks<T>(b) * kColumnBlock<T>;
}

// Element (t, c) of a blocked operand.
template <class T>
LATTE_INLINE T* blocked(T* p, int64_t t, int64_t c) {
  return p + c / kColumns<T> * kColumnBlock<T> + t * kColumns<T> + c % kColumns<T>;
}
// X and G at (t, c), c a multiple of the lanes, as two vectors of a paired operand.
template <class T>
LATTE_INLINE void store_pair(T* p, int64_t t, int64_t c, Vec<T> x, Vec<T> g) {
  T* block = p + c / kRows<T> * kRowBlock<T> + t * kLanes<T>;
  store(block, low_halves(x, g));
  store(block + kRowBlock<T>, high_halves(x, g));
}
template <class T>
LATTE_INLINE Vec<T> load_x(const T* p, int64_t t, int64_t c) {
  const T* block = p + c / kRows<T> * kRowBlock<T> + t * kLanes<T>;
  return low_halves(load(block), load(block + kRowBlock<T>));
}

// Block i of token t begins at data + i * block + t * token.
template <class T>
struct Stream {
  T* data = nullptr;
  int64_t block = 0, token = 0;

  LATTE_INLINE T* at(int64_t i, int64_t t) const { return data + i * block + t * token; }
};
// The first and the second half of a paired operand.
template <class T>
LATTE_INLINE Stream<const T> first_of_pair(const T* p) {
  return {p, kRowBlock<T>, kLanes<T>};
}
template <class T>
LATTE_INLINE Stream<const T> second_of_pair(const T* p) {
  return {p + kRows<T>, kRowBlock<T>, kLanes<T>};
}
template <class T>
LATTE_INLINE Stream<T> columns(T* blocks) {
  return {blocks, kColumnBlock<T>, kColumns<T>};
}
// Whole rows, `stride` apart, as X or G and as Y or O.
template <class T>
LATTE_INLINE Stream<T> row_blocks_of(T* rows, int64_t stride) {
  return {rows, kRows<T>, stride};
}
template <class T>
LATTE_INLINE Stream<T> column_blocks_of(T* rows, int64_t stride) {
  return {rows, kColumns<T>, stride};
}

// The state S of A rows and B columns, tile by tile.
template <class T>
struct Tiles {
  T* data;
  int64_t a, b;

  static int64_t size(int64_t a, int64_t b) {
    return row_blocks<T>(a) * column_blocks<T>(b) * kRows<T> * kColumns<T>;
  }
  T* tile(int64_t row_block, int64_t column_block) const {
    return data + (column_block * row_blocks<T>(a) + row_block) * kRows<T> * kColumns<T>;
  }
  T& at(int64_t i, int64_t j) const {
    return tile(i / kRows<T>, j / kColumns<T>)[i % kRows<T> * kColumns<T> + j % kColumns<T>];
  }
  void add(const Tiles& other) const {
    for (int64_t i = 0; i < size(a, b); i += kLanes<T>)
      store(data + i, load(data + i) + load(other.data + i));
  }
  // Row i times alpha[i], column j times alpha[j]; alpha is blocked.
  void scale_rows(const T* alpha) const {
    for (int64_t cb = 0; cb < column_blocks<T>(b); ++cb)
      for (int64_t i = 0; i < row_blocks<T>(a) * kRows<T>; ++i)
        for (int64_t j = 0; j < kColumns<T>; j += kLanes<T>) {
          T* const p = &at(i, cb * kColumns<T> + j);
          store(p, load(p) * splat(*blocked(alpha, 0, i)));
        }
  }
  void scale_columns(const T* alpha) const {
    for (int64_t j = 0; j < b; j += kLanes<T>)
      for (int64_t i = 0; i < row_blocks<T>(a) * kRows<T>; ++i)
        store(&at(i, j), load(&at(i, j)) * load(blocked(alpha, 0, j)));
  }
  void clear() const { __builtin_memset(data, 0, size(a, b) * sizeof(T)); }
};

enum class Part : int { both, update_only, output_only };

// How S decays between runs of tokens, in chunks where the reference rises (prepare.h): by alpha
// along the rows or along the columns, before a run going forward, after it going backward.
enum class Decay : int { none, rows_before, columns_before, rows_after, columns_after };

// Tokens of a chunk, in runs that share a reference: run i begins at token first[i].
struct Runs {
  int64_t count = 0;
  int64_t first[kChunk + 1];
};

// The next chunk's cache lines, spread evenly over the tiles of this chunk. A core has 16 to 24
// line buffers for first-level misses, and a prefetch holds one until memory answers: issued in a
// burst they block the scan's own misses (282 -> 219 ns per token). Memory in one piece is walked
// from line to line, so that the second level's stream prefetcher, which has queues of its own, is
// ahead of us: walked by columns of rows it never starts, and the buffers bound the scan (on a
// server with 130 ns to memory 376 instead of 286 cycles per token, 252 without misses).
class PrefetchList {
 public:
  static constexpr int64_t kMax = 96;

  // Spread over so many tiles.
  explicit PrefetchList(int64_t tiles) : tiles_(tiles) {}

  // The rows of a chunk that begins at `first`.
  template <class... Views>
  void add(int64_t first, const Views&... rows) {
    (add_rows(first, rows), ...);
  }
  // For heads that are walked together, the rows that the visit after this one, of head h to the
  // chunk at `first`, reads. Where the heads fill their rows the chunk at `next` is one piece of
  // memory for all of them, and this visit takes its share of that.
  template <class Head, class... Views>
  void add_next(const Head* heads, int64_t h, int64_t count, int64_t first, int64_t next,
                bool is_last, Views Head::*... rows) {
    (add_next_rows(heads, h, count, first, next, is_last, rows), ...);
  }

  // Neighbouring lines per token of a tile: one address, as a tile has no general register to
  // spare. Tiles of narrow vectors are so many that one line is enough, and have half as many
  // multiply-adds per load: there a second prefetch per token, due or not, took 3 to 5 % of a scan.
  static constexpr int kLines = LATTE_VECTOR_BYTES == 64 ? 2 : 1;
  static constexpr int64_t kLineBytes = 64;
  struct Walk {
    const char* line;
    int64_t step;
  };
  // That of the next tile; `idle` is an address that is in cache.
  Walk next(const void* idle) {
    credit_ += lines_;
    if (taken_ == count_) return none(idle);
    Piece& piece = pieces_[taken_];
    const bool linear = piece.stride == kLineBytes;
    int64_t due = credit_ / tiles_;
    due = due < kLines * kChunk ? due : kLines * kChunk;
    due = due < piece.lines ? due : piece.lines;
    // Rows have no part of a step.
    if (due == 0 || (!linear && due < piece.lines)) return none(idle);
    const Walk walk{piece.line, linear ? due * kLineBytes / kChunk : piece.stride};
    credit_ -= due * tiles_;
    piece.line += due * piece.stride;
    piece.lines -= due;
    taken_ += piece.lines == 0;
    return walk;
  }
  static Walk none(const void* idle) { return {static_cast<const char*>(idle), 0}; }

 private:
  struct Piece {
    const char* line;
    int64_t stride, lines;
  };

  template <class Head, class View>
  void add_next_rows(const Head* heads, int64_t h, int64_t count, int64_t first, int64_t next,
                     bool is_last, View Head::* rows) {
    const View &own = heads->*rows, &end = heads[count - 1].*rows;
    const int64_t bytes = own.row_bytes(), stride = own.stride_bytes();
    const bool filled =
        stride == count * bytes && end.row_address(0) - own.row_address(0) == stride - bytes;
    if (!own.one_piece()) return;
    if (filled && !is_last) {
      add_linear(own.row_address(next) + h * kChunk * bytes, kChunk * bytes);
    } else if (!filled && h + 1 < count) {
      add_rows(first, heads[h + 1].*rows);
    } else if (!filled && !is_last) {
      add_rows(next, own);
    }
  }
  template <class T>
  void add_rows(int64_t first, const RowView<T>& rows) {
    if (!rows.one_piece()) return;
    const char* const begin = rows.row_address(first);
    const int64_t bytes = rows.row_bytes(), stride = rows.stride_bytes();
    if (stride == bytes) return add_linear(begin, kChunk * bytes);
    for (int64_t byte = 0; byte < bytes; byte += kLines * kLineBytes)
      add_piece({begin + byte, stride, kLines * kChunk});
  }
  void add_linear(const char* begin, int64_t bytes) {
    add_piece({begin, kLineBytes, (bytes + kLineBytes - 1) / kLineBytes});
  }
  void add_piece(const Piece& piece) {
    if (count_ == kMax) return;
    pieces_[count_++] = piece;
    lines_ += piece.lines;
  }

  Piece pieces_[kMax];
  int64_t count_ = 0, taken_ = 0, lines_ = 0, credit_ = 0, tiles_;
};

template <class T>
struct ScanOperands {
  int64_t tokens;
  Tiles<T> state;
  bool reverse = false;  // from the last token to the first
  Stream<const T> x, g;  // blocks of R rows
  Stream<const T> y;     // blocks of columns
  Stream<T> o;
  Stream<T> final_o;         // if set, O's final sums go here
  bool accumulate = false;   // O holds a first term
  const T* alpha = nullptr;  // blocked, of the decayed side, a row per run
  const Runs* runs = nullptr;
  PrefetchList* prefetch = nullptr;
};

template <class T>
struct TileStreams {
  int64_t tokens, run;
  const Runs* runs;
  const T *x, *g, *y, *alpha, *o_in;
  T *o_out, *state;
  int64_t step_x, step_g, step_y, step_o_in, step_o_out;
  PrefetchList::Walk prefetch;
};

template <class T, int kVectors, bool kByRow>
LATTE_INLINE void decay_tile(Vec<T> (&s)[kRows<T>][kVectors], const T* alpha) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows<T>; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j)
      s[i][j] *= kByRow ? splat(alpha[i]) : load(alpha + j * kLanes<T>);
}

template <class T, int kVectors, Part kPart, bool kFirst, Decay kDecay>
inline void scan_tile(TileStreams<T> p) {
  constexpr int R = kRows<T>;
  constexpr int64_t lanes = kLanes<T>;
  constexpr bool by_row = kDecay == Decay::rows_before || kDecay == Decay::rows_after;
  constexpr bool before = kDecay == Decay::rows_before || kDecay == Decay::columns_before;
  constexpr bool after = kDecay == Decay::rows_after || kDecay == Decay::columns_after;
  // Without an output the chunk can have a sum of its own for free, added to the state at the end:
  // the error of tied keys then grows with the chunks, not with the tokens.
  constexpr bool own_sum = kPart == Part::update_only && kDecay == Decay::none;
  Vec<T> s[R][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j)
      s[i][j] = own_sum ? Vec<T>{} : load(p.state + i * kColumns<T> + j * lanes);

  for (int64_t t = 0; t < p.tokens; ++t) {
#pragma GCC unroll 2
    for (int i = 0; i < PrefetchList::kLines; ++i)
      prefetch<2>(p.prefetch.line + i * PrefetchList::kLineBytes);
    p.prefetch.line += p.prefetch.step;
    if constexpr (before)
      if (t == p.runs->first[p.run]) {
        decay_tile<T, kVectors, by_row>(s, p.alpha);
        p.alpha += kColumns<T>;
        ++p.run;
      }
    Vec<T> y[kVectors], o[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      if constexpr (kPart != Part::output_only) y[j] = load(p.y + j * lanes);
      if constexpr (kPart != Part::update_only) {
        if constexpr (kFirst) {
          o[j] = Vec<T>{};
        } else {
          o[j] = load(p.o_in + j * lanes);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      if constexpr (kPart != Part::output_only) {
        const Vec<T> x = splat(p.x[i]);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) s[i][j] += x * y[j];
      }
      if constexpr (kPart != Part::update_only) {
        const Vec<T> g = splat(p.g[i]);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) o[j] += g * s[i][j];
      }
    }
    if constexpr (kPart != Part::update_only) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) store(p.o_out + j * lanes, o[j]);
      p.o_in += p.step_o_in;
      p.o_out += p.step_o_out;
      p.g += p.step_g;
    }
    if constexpr (kPart != Part::output_only) {
      p.x += p.step_x;
      p.y += p.step_y;
    }
    if constexpr (after)
      if (p.tokens - 1 - t == p.runs->first[p.run]) {
        decay_tile<T, kVectors, by_row>(s, p.alpha);
        p.alpha -= kColumns<T>;
        --p.run;
      }
  }

  if constexpr (kPart != Part::output_only) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        T* const state = p.state + i * kColumns<T> + j * lanes;
        store(state, own_sum ? load(state) + s[i][j] : s[i][j]);
      }
  }
}

template <class T, Part kPart, Decay kDecay>
inline void scan_tiles(const ScanOperands<T>& operands) {
  const ScanOperands<T> s = operands;
  constexpr int64_t lanes = kLanes<T>;
  constexpr bool by_row = kDecay == Decay::rows_before || kDecay == Decay::rows_after;
  const int64_t row_count = row_blocks<T>(s.state.a), column_count = column_blocks<T>(s.state.b);
  const int64_t start = s.reverse ? s.tokens - 1 : 0, sign = s.reverse ? -1 : 1;
  for (int64_t cb = 0; cb < column_count; ++cb) {
    const bool narrow = s.state.b - cb * kColumns<T> <= lanes;
    for (int64_t rb = 0; rb < row_count; ++rb) {
      TileStreams<T> p;
      p.tokens = s.tokens;
      p.x = s.x.at(rb, start);
      p.g = s.g.at(rb, start);
      p.y = s.y.at(cb, start);
      p.o_in = p.o_out = s.o.at(cb, start);
      p.alpha = nullptr;
      p.runs = s.runs;
      p.run = 0;
      if constexpr (kDecay != Decay::none) {
        p.run = s.reverse ? s.runs->count - 1 : 0;
        p.alpha = blocked(s.alpha, p.run, by_row ? rb * kRows<T> : cb * kColumns<T>);
      }
      p.step_x = sign * s.x.token;
      p.step_g = sign * s.g.token;
      p.step_y = sign * s.y.token;
      p.step_o_in = p.step_o_out = sign * s.o.token;
      if (s.final_o.data && rb == row_count - 1) {
        p.o_out = s.final_o.at(cb, start);
        p.step_o_out = sign * s.final_o.token;
      }
      p.state = s.state.tile(rb, cb);
      p.prefetch = s.prefetch ? s.prefetch->next(p.state) : PrefetchList::none(p.state);
      if (rb == 0 && !s.accumulate) {
        narrow ? scan_tile<T, 1, kPart, true, kDecay>(p) : scan_tile<T, 2, kPart, true, kDecay>(p);
      } else {
        narrow ? scan_tile<T, 1, kPart, false, kDecay>(p)
               : scan_tile<T, 2, kPart, false, kDecay>(p);
      }
    }
  }
}

// The chunk of tied keys: its own sum starts from zero in `own`, and the state before it gives its
// share of O apart. 6 A B operations per token.
template <class T>
inline void scan_tied(const ScanOperands<T>& operands, const Tiles<T>& own) {
  ScanOperands<T> s = operands;
  s.final_o.data = nullptr;
  s.prefetch = nullptr;
  scan_tiles<T, Part::output_only, Decay::none>(s);
  own.clear();
  s = operands;
  s.accumulate = true;
  s.state = own;
  scan_tiles<T, Part::both, Decay::none>(s);
  operands.state.add(own);
}

template <class T>
LATTE_INLINE int64_t tile_count(const Tiles<T>& state) {
  return row_blocks<T>(state.a) * column_blocks<T>(state.b);
}

}  // namespace latte::LATTE_ISA
