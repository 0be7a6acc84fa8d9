// SPDX-License-Identifier: Apache-2.0
// Products of 16 x 16 tiles on tensor cores, float32 accumulators.
//
// HalfProduct rounds its factors to bfloat16 or float16. Tf32Product<1> keeps the 11 bits that
// float16 has, with the exponents of float32: the weights of float16 logits do not fit in float16.
// Tf32Product<3> adds the products with both remainders and reaches float32 accuracy.
//
// Operands come from shared memory: "rows" is a tile stored as it is used, "columns" its transpose.
#pragma once

#include "cuda/element.h"
#include "cuda/ptx.h"

namespace latte::cuda {

// Element r of half h of a lane: row 8 (r / 2) + lane / 4, column 8 h + 2 (lane % 4) + r % 2.
struct Tile {
  float c[2][4] = {};
};
__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / 32; }
__device__ __forceinline__ int tile_row(int r) { return 8 * (r / 2) + lane_id() / 4; }
__device__ __forceinline__ int tile_column(int h, int r) {
  return 8 * h + 2 * (lane_id() % 4) + r % 2;
}

// Calls f(row, column, element) for the lane's elements.
template <class F>
__device__ __forceinline__ void for_each_element(Tile& tile, F f) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int r = 0; r < 4; ++r) f(tile_row(r), tile_column(h, r), tile.c[h][r]);
}

template <class E>
__device__ __forceinline__ void unpack_pair(uint32_t pair, float& low, float& high) {
  if constexpr (std::is_same_v<E, __nv_bfloat16>) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000u);
  } else {
    low = __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
    high = __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
  }
}

// The tile at `from` as four 8 x 8 matrices of 16-bit elements: [0,8) x [0,8), [8,16) x [0,8),
// [0,8) x [8,16), [8,16) x [8,16) of rows x columns, or the middle two exchanged.
enum class Order { down, across };
template <Order kOrder, class E>
__device__ __forceinline__ const E* matrix_row(const E* from, int stride) {
  const int lane = lane_id(), first = lane / 8 % 2 * 8, second = lane / 16 * 8;
  return kOrder == Order::down ? from + (lane % 8 + first) * stride + second
                               : from + (lane % 8 + second) * stride + first;
}

// A tile of any element type in the layout of accumulators.
template <class E>
__device__ __forceinline__ Tile load_tile(const E* from, int stride) {
  Tile tile;
  if constexpr (sizeof(E) == 2) {
    uint32_t x[4];
    ldmatrix_x4(x, matrix_row<Order::down>(from, stride));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      unpack_pair<E>(x[i], tile.c[i / 2][i % 2 * 2], tile.c[i / 2][i % 2 * 2 + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int h = i / 2, r = i % 2 * 2;
      const float2 pair =
          *reinterpret_cast<const float2*>(from + tile_row(r) * stride + tile_column(h, 0));
      tile.c[h][r] = pair.x, tile.c[h][r + 1] = pair.y;
    }
  }
  return tile;
}

template <class Half>
struct HalfProduct {
  using Factor = Half;
  struct Left {
    uint32_t x[4];
  };
  struct Right {
    uint32_t x[4];
  };
  static constexpr bool kExact = false;

  __device__ static __forceinline__ float rounded(float x) {
    return to_compute(from_compute<Factor>(x));
  }
  __device__ static __forceinline__ Left left(const Tile& tile) {
    Left a;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a.x[i] = pack<Factor>(tile.c[i / 2][i % 2 * 2], tile.c[i / 2][i % 2 * 2 + 1]);
    return a;
  }
  __device__ static __forceinline__ Tile tile(const Left& a) {
    Tile tile;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      unpack_pair<Factor>(a.x[i], tile.c[i / 2][i % 2 * 2], tile.c[i / 2][i % 2 * 2 + 1]);
    return tile;
  }
  // Not rounded: E has no more bits than a factor.
  template <class E>
  __device__ static __forceinline__ Left left_rows(const E* from, int stride) {
    static_assert(std::is_same_v<E, Factor>);
    Left a;
    ldmatrix_x4(a.x, matrix_row<Order::down>(from, stride));
    return a;
  }
  __device__ static __forceinline__ Left left_columns(const Factor* from, int stride) {
    Left a;
    ldmatrix_x4_trans(a.x, matrix_row<Order::across>(from, stride));
    return a;
  }
  template <class E>
  __device__ static __forceinline__ Right right_rows(const E* from, int stride) {
    static_assert(std::is_same_v<E, Factor>);
    Right b;
    ldmatrix_x4_trans(b.x, matrix_row<Order::down>(from, stride));
    return b;
  }
  template <class E>
  __device__ static __forceinline__ Right right_columns(const E* from, int stride) {
    static_assert(std::is_same_v<E, Factor>);
    Right b;
    ldmatrix_x4(b.x, matrix_row<Order::across>(from, stride));
    return b;
  }
  __device__ static __forceinline__ void multiply(Tile& sum, const Left& a, const Right& b) {
    mma_m16n8k16<Factor>(sum.c[0], a.x, b.x[0], b.x[1]);
    mma_m16n8k16<Factor>(sum.c[1], a.x, b.x[2], b.x[3]);
  }
};

// A tile is two steps of 8 in the inner dimension. Its order is free as long as both operands
// agree: positions t and t + 4 of step j stand for 8 j + 2 t and 8 j + 2 t + 1, which is how
// accumulators lie in registers, and so a tile that was computed is an operand as it is.
template <int kPasses>
struct Tf32Product {
  using Factor = float;
  using Left = Tile;
  struct Right {
    float x[2][2][2];  // half of the columns, step, position
  };
  static constexpr bool kExact = kPasses == 3;

  __device__ static __forceinline__ float rounded(float x) {
    return kExact ? x : __uint_as_float(to_tf32(x));
  }
  __device__ static __forceinline__ Left left(const Tile& tile) {
    Left a = tile;
    for_each_element(a, [](int, int, float& x) { x = rounded(x); });
    return a;
  }
  __device__ static __forceinline__ const Tile& tile(const Left& a) { return a; }
  template <class E>
  __device__ static __forceinline__ Left left_rows(const E* from, int stride) {
    return load_tile(from, stride);
  }
  __device__ static __forceinline__ Left left_columns(const float* from, int stride) {
    Left a;
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        a.c[j][r] = from[(8 * j + 2 * t + r % 2) * stride + 8 * (r / 2) + g];
    return a;
  }
  template <class E>
  __device__ static __forceinline__ Right right_rows(const E* from, int stride) {
    Right b;
    if constexpr (sizeof(E) == 2) {
      uint32_t x[4];
      ldmatrix_x4_trans(x, matrix_row<Order::down>(from, stride));
#pragma unroll
      for (int i = 0; i < 4; ++i) unpack_pair<E>(x[i], b.x[i / 2][i % 2][0], b.x[i / 2][i % 2][1]);
    } else {
      const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        b.x[i / 4][i / 2 % 2][i % 2] =
            from[(8 * (i / 2 % 2) + 2 * t + i % 2) * stride + 8 * (i / 4) + g];
    }
    return b;
  }
  template <class E>
  __device__ static __forceinline__ Right right_columns(const E* from, int stride) {
    Right b;
    if constexpr (sizeof(E) == 2) {
      uint32_t x[4];
      ldmatrix_x4(x, matrix_row<Order::across>(from, stride));
#pragma unroll
      for (int i = 0; i < 4; ++i) unpack_pair<E>(x[i], b.x[i / 2][i % 2][0], b.x[i / 2][i % 2][1]);
    } else {
      const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = *reinterpret_cast<const float2*>(from + (8 * (i / 2) + g) * stride +
                                                             8 * (i % 2) + 2 * t);
        b.x[i / 2][i % 2][0] = pair.x, b.x[i / 2][i % 2][1] = pair.y;
      }
    }
    return b;
  }
  __device__ static __forceinline__ void multiply(Tile& sum, const Left& a, const Right& b) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      uint32_t high[4], low[4];
      const float step[4] = {a.c[j][0], a.c[j][2], a.c[j][1], a.c[j][3]};
      split(step, high, low);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t b_high[2], b_low[2];
        split(b.x[h][j], b_high, b_low);
        if constexpr (kExact) {
          mma_m16n8k8_tf32(sum.c[h], low, b_high[0], b_high[1]);
          mma_m16n8k8_tf32(sum.c[h], high, b_low[0], b_low[1]);
        }
        mma_m16n8k8_tf32(sum.c[h], high, b_high[0], b_high[1]);
      }
    }
  }

 private:
  // Of one pass all factors are rounded already, by rounded() or because they are halves.
  template <int kCount>
  __device__ static __forceinline__ void split(const float (&x)[kCount], uint32_t (&high)[kCount],
                                               uint32_t (&low)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      high[i] = kExact ? to_tf32(x[i]) : __float_as_uint(x[i]);
      low[i] = kExact ? to_tf32(x[i] - __uint_as_float(high[i])) : 0;
    }
  }
};

// A tile as factors in shared memory.
template <class Product>
__device__ __forceinline__ void share_tile(typename Product::Factor* to, int stride,
                                           const Tile& tile) {
  using Factor = typename Product::Factor;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int h = e / 2, r = e % 2 * 2;
    Vector<Factor, 2> pair;
    pair.values[0] = from_compute<Factor>(Product::rounded(tile.c[h][r]));
    pair.values[1] = from_compute<Factor>(Product::rounded(tile.c[h][r + 1]));
    *reinterpret_cast<Vector<Factor, 2>*>(to + tile_row(r) * stride + tile_column(h, 0)) = pair;
  }
}

// The product for inputs of a type.
template <class E>
struct ProductOf {
  using type = Tf32Product<std::is_same_v<E, float> ? 3 : 1>;
};
template <>
struct ProductOf<__nv_bfloat16> {
  using type = HalfProduct<__nv_bfloat16>;
};

}  // namespace latte::cuda
