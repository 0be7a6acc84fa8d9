// SPDX-License-Identifier: Apache-2.0
// Forward and backward passes as a share of this machine's multiply-add peak, without Python:
//
//   latte_kernels [threads]
//
// Work counts as 4 L D operations per token and head forward, 12 L D backward. Every repeat stands
// between two short measurements of the peak, since the speed of shared machines drifts. One thread
// is timed by its CPU time, several by wall time.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <vector>

#include "latte/latte.h"

namespace {

constexpr int kRepeats = 15;
constexpr double kPeakSeconds = 0.004;

struct Shape {
  int64_t heads, tokens, latents, dim;
};

// A tensor (1, heads, tokens, channels) of normally distributed values that owns its memory.
class Array {
 public:
  Array(const Shape& shape, int64_t channels)
      : values_(static_cast<size_t>(shape.heads * shape.tokens * channels)) {
    static std::mt19937 generator(0);
    std::normal_distribution<float> normal;
    for (float& x : values_) x = normal(generator);
    view = {values_.data(),
            latte::DType::float32,
            4,
            {1, shape.heads, shape.tokens, channels},
            {shape.heads * shape.tokens * channels, shape.tokens * channels, channels, 1}};
  }
  latte::Tensor view;

 private:
  std::vector<float> values_;
};

struct Problem {
  explicit Problem(const Shape& s)
      : q(s, s.latents),
        k(s, s.latents),
        dq(s, s.latents),
        dk(s, s.latents),
        v(s, s.dim),
        y(s, s.dim),
        dy(s, s.dim),
        dv(s, s.dim),
        work(static_cast<double>(s.heads * s.tokens * s.latents * s.dim)) {}
  Array q, k, dq, dk, v, y, dy, dv;
  double work;
};

double seconds_now(int threads) {
  if (threads == 1) return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The median share of the peak of run(params), which does so many operations.
template <class Params>
double share(void (*run)(const Params&, void*, int), const Params& params, double operations,
             int threads) {
  std::vector<char> workspace(static_cast<size_t>(latte::workspace_bytes(params, threads)));
  run(params, workspace.data(), threads);
  std::vector<double> shares;
  for (int i = 0; i < kRepeats; ++i) {
    const double before = latte::fma_rate(threads, kPeakSeconds);
    const double start = seconds_now(threads);
    run(params, workspace.data(), threads);
    const double seconds = seconds_now(threads) - start;
    const double peak = (before + latte::fma_rate(threads, kPeakSeconds)) / 2;
    shares.push_back(operations / seconds / peak);
  }
  std::nth_element(shares.begin(), shares.begin() + kRepeats / 2, shares.end());
  return shares[kRepeats / 2];
}

void print_shares(const Shape& shape, int threads) {
  const Problem p(shape);
  std::printf("(1, %ld, %ld, %ld, %ld)", static_cast<long>(shape.heads),
              static_cast<long>(shape.tokens), static_cast<long>(shape.latents),
              static_cast<long>(shape.dim));
  for (const bool causal : {true, false}) {
    latte::LatentAttentionForward forward;
    forward.q = p.q.view, forward.k = p.k.view, forward.v = p.v.view, forward.y = p.y.view;
    latte::LatentAttentionBackward backward;
    backward.q = p.q.view, backward.k = p.k.view, backward.v = p.v.view, backward.dy = p.dy.view;
    backward.dq = p.dq.view, backward.dk = p.dk.view, backward.dv = p.dv.view;
    forward.causal = backward.causal = causal;
    std::printf("\t%.3f\t%.3f",
                share(latte::latent_attention_forward, forward, 4 * p.work, threads),
                share(latte::latent_attention_backward, backward, 12 * p.work, threads));
    std::fflush(stdout);
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  std::printf("%s, threads %d, peak %.1f Gflop/s; shares of it\n", latte::cpu_isa(), threads,
              latte::fma_rate(threads, 0.1) / 1e9);
  std::printf("(B, H, T, L, D)\tcausal\tgradient\tbidirectional\tgradient\n");
  for (const Shape& shape :
       {Shape{8, 8192, 64, 64}, Shape{8, 8192, 128, 64}, Shape{4, 8192, 32, 64},
        Shape{8, 4096, 43, 43}, Shape{8, 4096, 10, 32}})
    print_shares(shape, threads);
}
