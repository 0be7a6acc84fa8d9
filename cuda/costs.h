// SPDX-License-Identifier: Apache-2.0
// What a causal pass of latent attention costs, of tokens in whole chunks, where neither L nor D is
// cut and a sequence is one part: pure functions, which the tests hold the emulation's counters to
// and tools/plan_table.cpp prints.
#pragma once

#include "cuda/attention_plan.h"

namespace latte::cuda {

// Products of 16 x 16 tiles that the blocks of one chunk make, with l and d tiles of latents and
// channels: normalisers of four tiles, scores in triangles of ten, the state read and written.
constexpr int64_t forward_products(int64_t l, int64_t d) { return 14 * l + 10 * d + 8 * l * d; }
// Scores of dy and v, normalisers, dp, and the state.
constexpr int64_t query_gradient_products(int64_t l, int64_t d) { return forward_products(l, d); }
// Scores of weights and r and of v and dy, dv, dk, suffix sums of r dp, and the state's gradient;
// the normalisers, where factors are recalled.
constexpr int64_t key_gradient_products(int64_t l, int64_t d, bool recalls) {
  return (recalls ? 34 : 30) * l + 20 * d + 12 * l * d;
}
// Instructions of a product: m16n8k16 of halves; m16n8k8 of TF32, three times for float32.
constexpr int64_t product_instructions(DType dtype) {
  return dtype == DType::bfloat16 ? 2 : dtype == DType::float16 ? 4 : 12;
}

// Bytes of one row of a head, in and out.
constexpr int64_t forward_bytes(int64_t latents, int64_t dim, DType dtype) {
  return 2 * (latents + dim) * element_bytes(dtype).input;
}
// q, k, v, dy, and k, v, dy once more; dq, dk, dv; two factors out and in, or q and dq in and a
// number per token out and in.
constexpr int64_t backward_bytes(int64_t latents, int64_t dim, DType dtype, bool recalls) {
  const ElementBytes e = element_bytes(dtype);
  const int64_t bytes = (5 * latents + 5 * dim) * e.input;
  return bytes + (recalls ? 2 * latents * e.input + 8 : 4 * latents * e.factor);
}
// Of the same without factors, each input once.
constexpr int64_t least_backward_bytes(int64_t latents, int64_t dim, DType dtype) {
  return (4 * latents + 3 * dim) * element_bytes(dtype).input;
}

}  // namespace latte::cuda
