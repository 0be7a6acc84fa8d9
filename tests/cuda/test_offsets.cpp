// SPDX-License-Identifier: Apache-2.0
// Tensors whose elements lie further apart than 32 bits count: the same bits as of dense ones.
// Their memory is reserved, and only the pages that are touched exist.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <memory>
#include <vector>

#include "problem.h"
#include "window_problem.h"

namespace testing_latte {
namespace {

// The elements of an array with 2^31 + 64 elements between neighbours of dimension `far`.
class FarArray {
 public:
  FarArray(const Array& a, int64_t far, bool is_input) : array_(a), tensor_(a.tensor()) {
    int64_t stride = 1;
    for (int64_t i = tensor_.rank - 1; i >= 0; --i) {
      if (i == far) stride = (int64_t{1} << 31) + 64;
      tensor_.stride[i] = stride;
      stride *= tensor_.shape[i];
    }
    bytes_ = static_cast<size_t>(stride * element_size(tensor_.dtype));
    tensor_.data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (tensor_.data == MAP_FAILED) throw std::bad_alloc();
    if (!is_input) return;
    const std::vector<unsigned char> values = a.bytes();
    for_each_element([&](int64_t i, unsigned char* at, int64_t size) {
      std::memcpy(at, values.data() + i * size, size);
    });
  }
  ~FarArray() { munmap(tensor_.data, bytes_); }
  FarArray(const FarArray&) = delete;
  FarArray& operator=(const FarArray&) = delete;

  const latte::Tensor& tensor() const { return tensor_; }
  std::vector<unsigned char> bytes() const {
    std::vector<unsigned char> all(array_.bytes().size());
    for_each_element([&](int64_t i, const unsigned char* at, int64_t size) {
      std::memcpy(all.data() + i * size, at, size);
    });
    return all;
  }

 private:
  template <class F>
  void for_each_element(F f) const {
    const int64_t size = element_size(tensor_.dtype);
    for (int64_t i = 0; i < array_.size(); ++i) {
      int64_t rest = i, at = 0;
      for (int64_t d = tensor_.rank - 1; d >= 0; --d) {
        at += rest % tensor_.shape[d] * tensor_.stride[d];
        rest /= tensor_.shape[d];
      }
      f(i, static_cast<unsigned char*>(tensor_.data) + at * size, size);
    }
  }

  const Array& array_;
  latte::Tensor tensor_;
  size_t bytes_;
};

// Far tensors in the place of a call's.
class FarTensors {
 public:
  explicit FarTensors(int64_t far) : far_(far) {}

  const latte::Tensor& input(const Array& a) { return add(a, true); }
  const latte::Tensor& output(const Array& a) { return add(a, false); }
  // Of the i-th that was asked for.
  void expect_bytes(size_t i, const Array& dense, const char* name) const {
    EXPECT_EQ(arrays_[i]->bytes(), dense.bytes()) << name << ", dimension " << far_;
  }

 private:
  const latte::Tensor& add(const Array& a, bool is_input) {
    arrays_.push_back(std::make_unique<FarArray>(a, far_, is_input));
    return arrays_.back()->tensor();
  }

  const int64_t far_;
  std::vector<std::unique_ptr<FarArray>> arrays_;
};

// A call and its gradient, which have run on dense tensors, once more on far ones.
template <class Dense, class Forward, class Backward, class Run>
void expect_same_bytes(const Dense& dense, Forward forward, Backward backward, int64_t far,
                       Run run_call) {
  FarTensors tensors(far);
  forward.y = tensors.output(dense.y);
  forward.q = tensors.input(dense.q), forward.k = tensors.input(dense.k);
  forward.v = tensors.input(dense.v);
  run_call(forward);
  tensors.expect_bytes(0, dense.y, "y");
  backward.q = forward.q, backward.k = forward.k, backward.v = forward.v;
  backward.dq = tensors.output(dense.dq), backward.dk = tensors.output(dense.dk);
  backward.dv = tensors.output(dense.dv), backward.dy = tensors.input(dense.dy);
  run_call(backward);
  tensors.expect_bytes(4, dense.dq, "dq");
  tensors.expect_bytes(5, dense.dk, "dk");
  tensors.expect_bytes(6, dense.dv, "dv");
}

TEST(Offsets, Latents) {
  for (const bool causal : {true, false})
    for (const int64_t far : {0, 1, 2}) {
      Case c;
      c.batch = 2, c.heads = 4, c.kv_heads = 2, c.tokens = 3, c.latents = 16, c.dim = 8;
      c.causal = causal, c.states = false;
      c.set_type(DType::bfloat16);
      Call dense(c);
      dense.check_forward();
      dense.check_backward();
      expect_same_bytes(dense, dense.forward_params(), dense.backward_params(), far,
                        [](const auto& params) { run(params, 1); });
    }
}

struct RunWindow {
  void operator()(const latte::SlidingWindowForward& p) const {
    run(backend::sliding_window_forward, p, 1);
  }
  void operator()(const latte::SlidingWindowBackward& p) const {
    run(backend::sliding_window_backward, p, 1);
  }
};

TEST(Offsets, Windows) {
  for (const int64_t far : {0, 1, 2}) {
    WindowCase c;
    c.tokens = 3, c.key_dim = 16, c.dim = 8, c.type = DType::bfloat16, c.window = 2;
    WindowCall dense(c);
    dense.check();
    expect_same_bytes(dense, dense.forward_params(), dense.backward_params(), far, RunWindow());
  }
}

}  // namespace
}  // namespace testing_latte
