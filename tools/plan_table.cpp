// SPDX-License-Identifier: Apache-2.0
// What the planner makes of the shapes that docs/gpu.md has targets for, a line of JSON per kernel;
// tools/check_ptxas.py joins it with the registers that ptxas gives the kernel.
#include <cinttypes>
#include <cstdio>

#include "cuda/costs.h"

namespace {

using namespace latte::cuda;
using latte::DType;

constexpr int64_t kLimit = 227 * 1024;  // of sm_90
constexpr DType kType = DType::bfloat16;

struct Shape {
  int64_t batch, heads, tokens, latents, dim;
};
constexpr Shape kShapes[] = {
    {8, 16, 4096, 64, 64}, {1, 16, 65536, 64, 64}, {4, 16, 8192, 128, 128}};

// A launch: blocks of one kernel, each of `products` tile products per chunk.
struct Launch {
  const char* kernel;
  int contents, latents, channels;
  int64_t blocks, chunks, products;
};

void print(const Shape& s, const char* pass, const Launch& l, int64_t moved, int64_t least) {
  const SharedBytes b = shared_bytes(element_bytes(kType), l.latents, l.channels, l.contents);
  const int count = stages(b.stage, b.other(), kLimit);
  std::printf("{\"call\": \"%s\", \"shape\": \"(%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64
              ", %" PRId64
              ")\", \"kernel\": \"%s<KernelShape<__nv_bfloat16, %d, %d, %d> >\", "
              "\"blocks\": %" PRId64 ", \"threads\": %d, \"shared\": %" PRId64
              ", \"stages\": %d, \"mma\": %" PRId64 ", \"moved\": %" PRId64 ", \"least\": %" PRId64
              "}\n",
              pass, s.batch, s.heads, s.tokens, s.latents, s.dim, l.kernel, l.latents, l.channels,
              l.contents, l.blocks, kAttentionThreads, b.total(count), count,
              l.blocks * l.chunks * l.products * product_instructions(kType), moved, least);
}

// Tokens of a part, in chunks.
int64_t chunks_of(const Shape& s, int64_t parts) {
  return round_up(ceil_div(s.tokens, parts), kChunk) / kChunk;
}

void forward(const Shape& s) {
  const int tile = forward_latents(s.latents, kType, kLimit), slice = value_slice(tile, kType);
  const int64_t blocks = s.batch * s.heads * ceil_div(s.dim, slice) * ceil_div(s.latents, tile);
  const int64_t parts = causal_segments(blocks, s.tokens), rows = s.batch * s.heads * s.tokens;
  const int64_t least = rows * forward_bytes(s.latents, s.dim, kType);
  // Keys and values of all parts but the last are read by the summaries too; states are small.
  const int64_t again =
      rows * (parts - 1) / parts * (s.latents + s.dim) * element_bytes(kType).input;
  if (parts > 1)
    print(s, "forward",
          {"key_summary", kKeys, tile, slice, blocks * (parts - 1), chunks_of(s, parts),
           4 * (tile / 16) * (slice / 16)},
          least + again, least);
  print(s, "forward",
        {"causal_forward", kForwardContents, tile, slice, blocks * parts, chunks_of(s, parts),
         forward_products(tile / 16, slice / 16)},
        least + again, least);
}

void backward(const Shape& s) {
  const int tile = gradient_latents(s.latents, kType, kLimit), slice = kGradientChannels;
  const int64_t slices = ceil_div(s.dim, slice), latent_slices = ceil_div(s.latents, tile);
  const int64_t blocks = s.batch * s.heads * slices * latent_slices;
  const int64_t parts = causal_segments(blocks, s.tokens), rows = s.batch * s.heads * s.tokens;
  const ElementBytes e = element_bytes(kType);
  const bool recalls = recalls_factors(kType) && slices * latent_slices * parts == 1;
  int64_t row = backward_bytes(s.latents, s.dim, kType, recalls);
  // A softmax of its own, r dp of every slice of D; partial dq, dk and dv in float32, out and in.
  if (latent_slices > 1) row += s.latents * e.input + 16;
  row += 2 * (slices - 1) * s.latents * e.factor;
  if (slices * latent_slices > 1 || parts > 1) row += s.latents * (8 * slices + e.input);
  if (slices > 1) row += 8 * slices * s.latents;
  if (latent_slices > 1) row += 8 * latent_slices * s.dim;
  // Keys and values of all parts but the last are read by the summaries too.
  const int64_t again = rows * (parts - 1) / parts * (s.latents + s.dim) * e.input;
  const int64_t moved = rows * row + again;
  const int64_t least = rows * least_backward_bytes(s.latents, s.dim, kType);
  const int l = tile / 16, d = slice / 16;
  const bool sums = parts > 1;
  print(s, "backward",
        {"query_gradient", sums ? kQuerySumContents : query_gradient_contents(kType), tile, slice,
         blocks * parts, chunks_of(s, parts), query_gradient_products(l, d) + sums * 4 * l * d},
        moved, least);
  print(s, "backward",
        {"key_gradient", recalls ? kRecallingContents : kKeyGradientContents, tile, slice,
         blocks * parts, chunks_of(s, parts), key_gradient_products(l, d, recalls)},
        moved, least);
}

}  // namespace

int main() {
  for (const Shape& s : kShapes) forward(s);
  for (const Shape& s : kShapes) backward(s);
}
