// SPDX-License-Identifier: Apache-2.0
// A call becomes tasks, one per segment of tokens, group of sequences and block of channels, whose
// bits depend on nothing but their own inputs. The gradients of weight and bias are sums over all
// tokens: every task leaves its own, and they are added in a fixed order.
#include "cpu/mixer_call.h"
#include "latte/latte.h"

namespace latte {
namespace {

using cpu::Convolution;
using cpu::ConvolutionTask;
using cpu::Range;

class ForwardCall {
 public:
  static constexpr Convolution kKernel = Convolution::forward;
  static constexpr bool kSums = false;
  explicit ForwardCall(const ShortConvForward& p) : problem(validate(p)), p_(p) {}
  Range range(int64_t n) const { return cpu::range_of(problem, p_.cu_seqlens, n); }
  const Tensor& output() const { return p_.y; }
  bool causal() const { return p_.causal; }
  ConvolutionTask task(int64_t n, int64_t c) const {
    const Range r = range(n);
    ConvolutionTask t;
    t.x = rows_of(p_.x, r, c);
    t.y = rows_of(p_.y, r, c);
    t.weight = cpu::parameter_of(p_.weight, c);
    t.bias = cpu::parameter_of(p_.bias, c);
    t.initial = cpu::state_of(p_.initial, n, c);
    t.final = cpu::state_of(p_.final, n, c);
    return t;
  }
  const MixerProblem problem;

 private:
  const ShortConvForward& p_;
};

class BackwardCall {
 public:
  static constexpr Convolution kKernel = Convolution::backward;
  static constexpr bool kSums = true;
  explicit BackwardCall(const ShortConvBackward& p) : problem(validate(p)), p_(p) {}
  Range range(int64_t n) const { return cpu::range_of(problem, p_.cu_seqlens, n); }
  const Tensor& output() const { return p_.dx; }
  bool causal() const { return p_.causal; }
  ConvolutionTask task(int64_t n, int64_t c) const {
    const Range r = range(n);
    ConvolutionTask t;
    t.x = rows_of(p_.x, r, c);
    t.dy = rows_of(p_.dy, r, c);
    t.dx = rows_of(p_.dx, r, c);
    t.weight = cpu::parameter_of(p_.weight, c);
    t.initial = cpu::state_of(p_.initial, n, c);
    t.d_final = cpu::state_of(p_.d_final, n, c);
    t.d_initial = cpu::state_of(p_.d_initial, n, c);
    return t;
  }
  ConvolutionTask task_of_parameters(int64_t c) const {
    ConvolutionTask t;
    t.d_weight = cpu::parameter_of(p_.d_weight, c);
    t.d_bias = cpu::parameter_of(p_.d_bias, c);
    return t;
  }
  const MixerProblem problem;

 private:
  const ShortConvBackward& p_;
};

// Workspace: scratch per thread, then K + 1 rows of sums per segment and group.
template <class Call>
class Plan {
 public:
  Plan(const Call& call, int threads)
      : call_(call), threads_(useful_threads(call, threads)), grid_(call.problem, 1) {
    const MixerProblem& p = call.problem;
    int64_t longest = 0;
    for (int64_t n = 0; n < p.sequences; ++n)
      if (call.range(n).tokens > longest) longest = call.range(n).tokens;
    segments_ = cpu::conv_segments(longest, grid_.groups());
    scratch_ =
        cpu::round_to_alignment(cpu::kernels().convolution_bytes(p.is_double, grid_.block_width()));
    const Tensor& out = call.output();
    stream_ = p.batch * p.tokens * p.channels * element_size(out.dtype) >= cpu::kStreamBytes;
  }

  int64_t bytes() const {
    return threads_ * scratch_ + (Call::kSums ? tasks_per_block() * rows() * stride() * 8 : 0);
  }

  void run(char* base) const {
    const int64_t blocks = grid_.blocks();
    cpu::parallel_for(tasks_per_block() * blocks, threads_, [&](int64_t i, int thread) {
      const int64_t block = i % blocks, unit = i / blocks, c = grid_.first_channel(block);
      const int64_t group = unit / segments_, segment = unit % segments_;
      for (int64_t n = grid_.border(group); n < grid_.border(group + 1); ++n) {
        ConvolutionTask task = call_.task(n, c);
        task.tokens = call_.range(n).tokens;
        task.begin = cut(segment, task.tokens);
        task.end = cut(segment + 1, task.tokens);
        task.is_first = segment == 0;
        task.is_last = segment == segments_ - 1;
        task.partial = partial(base, unit, c);
        task.accumulate = n > grid_.border(group);
        run_task(Call::kKernel, task, block, base + thread * scratch_);
      }
    });
    if constexpr (Call::kSums) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t c = grid_.first_channel(block);
        ConvolutionTask task = call_.task_of_parameters(c);
        task.partial = partial(base, 0, c);
        task.partials = tasks_per_block();
        run_task(Convolution::reduce, task, block, base);
      }
    }
  }

 private:
  static int useful_threads(const Call& call, int threads) {
    const MixerProblem& p = call.problem;
    const double numbers = static_cast<double>(p.batch) * static_cast<double>(p.tokens) *
                           static_cast<double>(p.channels);
    return cpu::useful_threads((8.0 + static_cast<double>(p.width)) * numbers,
                               cpu::kThreaded ? threads : 1);
  }
  int64_t tasks_per_block() const { return grid_.groups() * segments_; }
  int64_t rows() const { return call_.problem.width + 1; }
  int64_t stride() const { return cpu::padded_channels(call_.problem.channels); }
  int64_t cut(int64_t segment, int64_t tokens) const {
    return segment == segments_ ? tokens
                                : tokens * segment / segments_ / cpu::kTileRows * cpu::kTileRows;
  }
  double* partial(char* base, int64_t unit, int64_t c) const {
    return reinterpret_cast<double*>(base + threads_ * scratch_) + unit * rows() * stride() + c;
  }

  void run_task(Convolution kernel, ConvolutionTask& task, int64_t block, char* scratch) const {
    const int64_t width = call_.problem.width;
    task.channels = grid_.channels(block);
    task.width = width;
    task.left = call_.causal() ? width - 1 : (width - 1) / 2;
    task.partial_stride = stride();
    task.stream = stream_;
    cpu::kernels().convolution(kernel, call_.problem.is_double, task, scratch);
  }

  const Call& call_;
  int threads_;
  cpu::Grid grid_;
  int64_t segments_ = 1, scratch_ = 0;
  bool stream_ = false;
};

}  // namespace

int64_t workspace_bytes(const ShortConvForward& params, int threads) {
  return cpu::call_workspace<Plan, ForwardCall>(params, "short_conv", threads);
}
int64_t workspace_bytes(const ShortConvBackward& params, int threads) {
  return cpu::call_workspace<Plan, BackwardCall>(params, "short_conv_backward", threads);
}
void short_conv_forward(const ShortConvForward& params, void* workspace, int threads) {
  cpu::run_call<Plan, ForwardCall>(params, "short_conv", workspace, threads);
}
void short_conv_backward(const ShortConvBackward& params, void* workspace, int threads) {
  cpu::run_call<Plan, BackwardCall>(params, "short_conv_backward", workspace, threads);
}

}  // namespace latte
