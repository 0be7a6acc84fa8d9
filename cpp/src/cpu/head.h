// SPDX-License-Identifier: Apache-2.0
// What the drivers of one head share: its sources and sinks, its state in and out.
#pragma once

#include "cpu/arena.h"
#include "cpu/prepare.h"

namespace latte::LATTE_ISA {

using cpu::HeadState;
using cpu::HeadTask;

template <class T>
inline constexpr T kAbsentLogit = T(-__builtin_inf());

template <class T>
LATTE_INLINE Source<T> logits_q(const HeadTask& task) {
  return {task.q, PerRow::every, task.latents, task.group, kAbsentLogit<T>, T(task.scale)};
}
template <class T>
LATTE_INLINE Source<T> logits_k(const HeadTask& task, int64_t group) {
  return {task.k,          PerRow::first, task.latents,  group,
          kAbsentLogit<T>, T(task.scale), task.key_mask, task.key_mask_stride};
}
// A masked value reads as zero: its weight is zero, and 0 * NaN is not.
template <class T>
LATTE_INLINE Source<T> values(const HeadTask& task, int64_t group) {
  return {task.v, PerRow::first, task.dim, group, T(0), T(1), task.key_mask, task.key_mask_stride};
}
template <class T>
LATTE_INLINE Source<T> output_gradient(const HeadTask& task) {
  return {task.dy, PerRow::every, task.dim, task.group, T(0)};
}

// n rows in place if they can be read there and lie no more than `max_stride` bytes apart, else
// copied to `scratch`.
template <class T>
struct RowsInUse {
  const T* data;
  int64_t stride;

  RowsInUse(const T* rows, int64_t rows_stride) : data(rows), stride(rows_stride) {}
  RowsInUse(const Source<T>& source, int64_t first, int64_t n, T* scratch, int64_t scratch_stride,
            int64_t max_stride = INT64_MAX)
      : data(scratch), stride(scratch_stride) {
    if (source.in_place() && source.stride_bytes() <= max_stride) {
      data = source.row_in_place(first);
      stride = source.stride_in_place();
    } else {
      source.copy(first, n, scratch, scratch_stride);
    }
  }
};

// softmax_rows() of n rows of logits, in whatever dtype they are.
template <class T>
LATTE_INLINE void softmax_of(const Source<T>& q, int64_t first, int64_t n, int64_t width,
                             T* scratch, T* p, int64_t stride, T* inverse_sums) {
  q.with_vectors(first, n, scratch, stride,
                 [&](const auto& rows) { softmax_rows(n, width, rows, p, stride, inverse_sums); });
}

// The sum over latents of n rows times the rows of a blocked operand, kLanes rows at a time: a sum
// across one vector is a chain of eight operations that nothing else can hide.
template <class T>
inline void row_products(int64_t n, int64_t width, const T* rows, int64_t stride, const T* blocks,
                         T* out) {
  for (int64_t first = 0; first < n; first += kLanes<T>) {
    Vec<T> sums[kLanes<T>] = {};
    for (int64_t i = 0; i < kLanes<T> && first + i < n; ++i) {
      Vec<T> sum = {};
      for (int64_t l = 0; l < width; l += kLanes<T>)
        sum += load(rows + (first + i) * stride + l) * load(blocked(blocks, first + i, l));
      sums[i] = sum;
    }
    store(out + first, sums_of<T>(sums));
  }
}

// Rows of a result: written in place if possible, else to `scratch` and converted by flush().
template <class T>
class RowsResult {
 public:
  RowsResult(const Sink<T>& sink, int64_t first, T* scratch, int64_t scratch_stride)
      : data(scratch), stride(scratch_stride), sink_(sink), first_(first) {
    if (!sink.in_place()) return;
    data = sink.row_in_place(first);
    stride = sink.stride_in_place();
  }
  void flush(int64_t n) const {
    if (sink_.in_place()) return;
    sink_.write(first_, n, [rows = data, step = stride](int64_t i, int64_t c) {
      return load(rows + i * step + c);
    });
  }

  T* data;
  int64_t stride;

 private:
  const Sink<T>& sink_;
  int64_t first_;
};

// n rows of a sink that is not written in place, out of blocks of a chunk.
template <class T>
LATTE_INLINE void flush_blocks(const Sink<T>& sink, int64_t first, int64_t n, const T* blocks) {
  if (sink.in_place()) return;
  sink.write(first, n, [=](int64_t i, int64_t c) { return load(blocked(blocks, i, c)); });
}

template <class T>
LATTE_INLINE ScanOperands<T> scan_operands(int64_t n, const Tiles<T>& state, T* o) {
  ScanOperands<T> scan;
  scan.tokens = n;
  scan.state = state;
  if (o) scan.o = columns(o);
  return scan;
}

// The scan's last sums go straight to a sink that is written in place.
template <class T>
LATTE_INLINE void write_in_place(ScanOperands<T>& scan, const Sink<T>& sink, int64_t first) {
  if (sink.in_place())
    scan.final_o = column_blocks_of(sink.row_in_place(first), sink.stride_in_place());
}

// n rows as the scan's X or G.
template <class T>
LATTE_INLINE Stream<const T> row_operand(const Source<T>& source, int64_t first, int64_t n,
                                         T* scratch, int64_t scratch_stride) {
  const RowsInUse<T> rows(source, first, n, scratch, scratch_stride, cpu::kMaxRowStride);
  return row_blocks_of(rows.data, rows.stride);
}
// And as its Y, which has `behind` rows after those n. Lanes past the width may hold anything: they
// end in columns of S and O that nobody reads.
template <class T>
LATTE_INLINE Stream<const T> column_operand(const Source<T>& source, int64_t first, int64_t n,
                                            int64_t behind, T* scratch, int64_t scratch_stride) {
  if (source.vectors_in_place(behind) && source.stride_bytes() <= cpu::kMaxColumnStride)
    return column_blocks_of<const T>(source.row_in_place(first), source.stride_in_place());
  const RowsInUse<T> rows(source, first, n, scratch, scratch_stride, cpu::kMaxColumnStride);
  return column_blocks_of(rows.data, rows.stride);
}

template <class T>
LATTE_INLINE T& at(const cpu::Column& column, int64_t t, int64_t g) {
  return static_cast<T*>(column.data)[t * column.stride_t + g * column.stride_g];
}

// What row i of dq, a token and query head, adds to u - <p, u>: dq = p (that) scale.
template <class T>
LATTE_INLINE T log_sum_gradient(const HeadTask& task, int64_t i) {
  return task.d_log_sum.data ? at<T>(task.d_log_sum, i / task.group, i % task.group) : T(0);
}

template <class T>
LATTE_INLINE T read(const void* base, int64_t offset) {
  return static_cast<const T*>(base)[offset];
}

// The state in the kernels' form: normaliser, and S = norm * mean in tiles.
template <class T>
inline void start_state(const HeadState& state, int64_t latents, int64_t dim, int64_t width,
                        const Normaliser<T>& norm, const Tiles<T>& tiles, bool transposed) {
  tiles.clear();
  for (int64_t l = 0; l < width; ++l) {
    norm.r[l] = kLowest<T>;
    // A lane without a latent is not an empty latent.
    norm.z[l] = l < latents ? T(0) : T(1);
    norm.top[l] = -T(__builtin_inf());
  }
  if (!state.norm) return;
  for (int64_t l = 0; l < latents; ++l) {
    const T mass = read<T>(state.norm, l * state.norm_stride);
    const T top = read<T>(state.max, l * state.max_stride);
    if (mass == 0 || top == -T(__builtin_inf())) continue;
    norm.r[l] = norm.top[l] = top;
    norm.z[l] = mass;
    for (int64_t d = 0; d < dim; ++d) {
      const T mean = read<T>(state.mean, l * state.mean_stride_l + d * state.mean_stride_d);
      (transposed ? tiles.at(d, l) : tiles.at(l, d)) = mass * mean;
    }
  }
}

// The state after no token at all, bit for bit.
template <class T>
inline void copy_state(const HeadState& from, const HeadState& to, int64_t latents, int64_t dim) {
  for (int64_t l = 0; l < latents; ++l) {
    static_cast<T*>(to.max)[l * to.max_stride] = read<T>(from.max, l * from.max_stride);
    static_cast<T*>(to.norm)[l * to.norm_stride] = read<T>(from.norm, l * from.norm_stride);
    for (int64_t d = 0; d < dim; ++d)
      static_cast<T*>(to.mean)[l * to.mean_stride_l + d * to.mean_stride_d] =
          read<T>(from.mean, l * from.mean_stride_l + d * from.mean_stride_d);
  }
}

// Writes max, norm and mean; `divided`: the tiles hold the mean already.
template <class T>
inline void finish_state(const HeadState& state, int64_t latents, int64_t dim,
                         const Normaliser<T>& norm, const Tiles<T>& tiles, bool divided,
                         bool transposed = false) {
  if (!state.norm) return;
  for (int64_t l = 0; l < latents; ++l) {
    const T z = norm.z[l];
    const T scale = z == 0 ? T(0) : (divided ? T(1) : 1 / z);
    static_cast<T*>(state.max)[l * state.max_stride] = norm.top[l];
    static_cast<T*>(state.norm)[l * state.norm_stride] =
        z == 0 ? T(0) : z * exp_scalar(norm.r[l] - norm.top[l]);
    T* mean = static_cast<T*>(state.mean) + l * state.mean_stride_l;
    for (int64_t d = 0; d < dim; ++d)
      mean[d * state.mean_stride_d] = (transposed ? tiles.at(d, l) : tiles.at(l, d)) * scale;
  }
}

// final = merge(initial, other), the merge of the state algebra. `final` may be either of them.
template <class T>
inline void merge_states(const HeadTask& task) {
  const HeadState &a = task.initial, &b = task.other, &out = task.final;
  for (int64_t l = 0; l < task.latents; ++l) {
    const T a_max = read<T>(a.max, l * a.max_stride), b_max = read<T>(b.max, l * b.max_stride);
    const T a_norm = read<T>(a.norm, l * a.norm_stride),
            b_norm = read<T>(b.norm, l * b.norm_stride);
    const T top = a_max > b_max ? a_max : b_max;
    const T a_mass = a_norm == 0 ? T(0) : a_norm * exp_scalar(a_max - top);
    const T b_mass = b_norm == 0 ? T(0) : b_norm * exp_scalar(b_max - top);
    const T norm = a_mass + b_mass, share = norm == 0 ? T(0) : b_mass / norm;
    static_cast<T*>(out.max)[l * out.max_stride] = top;
    static_cast<T*>(out.norm)[l * out.norm_stride] = norm;
    for (int64_t d = 0; d < task.dim; ++d) {
      const T first = read<T>(a.mean, l * a.mean_stride_l + d * a.mean_stride_d);
      const T second = read<T>(b.mean, l * b.mean_stride_l + d * b.mean_stride_d);
      static_cast<T*>(out.mean)[l * out.mean_stride_l + d * out.mean_stride_d] =
          a_norm == 0 ? second : first + share * (second - first);
    }
  }
}

// carry_out += carry_in. A carry without a frame (max) needs no conversion.
template <class T>
inline void merge_carries(const HeadTask& task) {
  const HeadState &from = task.carry_in, &to = task.carry_out;
  for (int64_t l = 0; l < task.latents; ++l) {
    T factor = 1;
    if (from.max) {
      factor =
          exp_scalar(read<T>(to.max, l * to.max_stride) - read<T>(from.max, l * from.max_stride));
      static_cast<T*>(to.norm)[l * to.norm_stride] +=
          factor * read<T>(from.norm, l * from.norm_stride);
    }
    for (int64_t d = 0; d < task.dim; ++d)
      static_cast<T*>(to.mean)[l * to.mean_stride_l + d * to.mean_stride_d] +=
          factor * read<T>(from.mean, l * from.mean_stride_l + d * from.mean_stride_d);
  }
}

}  // namespace latte::LATTE_ISA
