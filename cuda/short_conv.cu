// SPDX-License-Identifier: Apache-2.0
#include "common/validate_mixers.h"
#include "cuda/call.h"
#include "cuda/short_conv.cuh"
#include "cuda/sum.cuh"
#include "latte/cuda.h"

namespace latte::cuda {
namespace {

constexpr const char* kForward = "short_conv";
constexpr const char* kBackward = "short_conv_backward";

// Calls f with the width as a compile-time constant.
template <int kWidth = 1, class F>
void with_width(int64_t width, F f) {
  if constexpr (kWidth == kMaxWidth) {
    f.template operator()<kWidth>();
  } else {
    width == kWidth ? f.template operator()<kWidth>() : with_width<kWidth + 1>(width, f);
  }
}

class Plan {
 public:
  template <class Params>
  Plan(const char* op, const Params& params) : op_(op), problem_(validate(params, Memory::device)) {
    const MixerProblem& p = problem_;
    kernel.sequences = Sequences(params.cu_seqlens, p.sequences, p.tokens);
    kernel.tokens = p.tokens, kernel.channels = p.channels, kernel.width = p.width;
    kernel.left = params.causal ? p.width - 1 : (p.width - 1) / 2;
    kernel.run = conv_tokens(p.batch * p.tokens, p.channels);
    kernel.runs = ceil_div(p.tokens, kernel.run);
    kernel.x = rows_of(params.x);
    kernel.weight = parameter_of(params.weight);
    kernel.initial = rows_of(params.initial);
  }

  ConvParams kernel;

 protected:
  int64_t runs() const { return problem_.batch * kernel.runs; }
  void walk(void (*pass)(ConvParams), void* stream) const {
    const int threads = channel_threads(kernel.channels);
    launch_blocks(op_, pass, runs() * ceil_div(kernel.channels, threads),
                  dim3(static_cast<unsigned>(threads)), 0, stream, kernel);
  }
  void states(void (*pass)(ConvParams), void* stream) const {
    launch_blocks(op_, pass, ceil_div(problem_.sequences * kernel.channels, kChannelThreads),
                  dim3(kChannelThreads), 0, stream, kernel);
  }

  const char* op_;
  MixerProblem problem_;
};

class ForwardPlan : public Plan {
 public:
  explicit ForwardPlan(const ShortConvForward& p) : Plan(kForward, p) {
    kernel.bias = parameter_of(p.bias);
    kernel.y = rows_of(p.y);
    kernel.final = rows_of(p.final);
  }
  void place(Workspace&) {}
  void run(void* stream) const {
    with_compute_type(problem_.is_double, [&](auto type) {
      using T = typename decltype(type)::type;
      with_width(kernel.width, [&]<int K>() { walk(conv_forward<T, K>, stream); });
      if (kernel.final.data) states(conv_final<T>, stream);
    });
  }
};

class BackwardPlan : public Plan {
 public:
  explicit BackwardPlan(const ShortConvBackward& p) : Plan(kBackward, p), causal_(p.causal) {
    kernel.dy = rows_of(p.dy), kernel.dx = rows_of(p.dx);
    kernel.d_weight = parameter_of(p.d_weight), kernel.d_bias = parameter_of(p.d_bias);
    kernel.d_final = rows_of(p.d_final), kernel.d_initial = rows_of(p.d_initial);
  }
  void place(Workspace& workspace) {
    kernel.partial = workspace.take<char>(runs() * columns() * (problem_.is_double ? 8 : 4));
  }
  void run(void* stream) const {
    with_compute_type(problem_.is_double, [&](auto type) {
      using T = typename decltype(type)::type;
      with_width(kernel.width, [&]<int K>() {
        walk(causal_ ? conv_backward<T, K, true> : conv_backward<T, K, false>, stream);
      });
      if (kernel.d_initial.data) states(conv_d_initial<T>, stream);
      launch_blocks(op_, sum_rows<T, WriteConvGradient<T>>, ceil_div(columns(), kSumColumns),
                    dim3(kSumColumns, kSumRows), kSumShared, stream,
                    static_cast<const T*>(kernel.partial), runs(), columns(),
                    WriteConvGradient<T>{kernel});
    });
  }

 private:
  int64_t columns() const { return (kernel.width + 1) * kernel.channels; }

  bool causal_;
};

}  // namespace

int64_t workspace_bytes(const ShortConvForward& params) {
  return workspace_of(ForwardPlan(params));
}
int64_t workspace_bytes(const ShortConvBackward& params) {
  return workspace_of(BackwardPlan(params));
}
void short_conv_forward(const ShortConvForward& params, void* workspace, void* stream) {
  run_plan(kForward, ForwardPlan(params), workspace, stream);
}
void short_conv_backward(const ShortConvBackward& params, void* workspace, void* stream) {
  run_plan(kBackward, BackwardPlan(params), workspace, stream);
}

}  // namespace latte::cuda
