// SPDX-License-Identifier: Apache-2.0
// The operators of torch.ops.latte_ext for programs without Python, through torch's stable C
// interface: a package of AOTInductor finds them after dlopen(). The Python package registers
// nothing of what is here already: an operator has one definer.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>

#include "operators/all.h"
#include "operators/workspace.h"

namespace {

using torch::headeronly::ScalarType;

latte::DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return latte::DType::float32;
    case ScalarType::Double:
      return latte::DType::float64;
    case ScalarType::BFloat16:
      return latte::DType::bfloat16;
    case ScalarType::Half:
      return latte::DType::float16;
    case ScalarType::Bool:
      return latte::DType::boolean;
    case ScalarType::Int:
      return latte::DType::int32;
    case ScalarType::Long:
      return latte::DType::int64;
    default:
      throw std::runtime_error(
          "[latte_ext] got a tensor of an unsupported dtype, expected float32, float64, bfloat16, "
          "float16, bool, int32 or int64");
  }
}

int32_t torch_dtype(latte::DType dtype) {
  switch (dtype) {
    case latte::DType::float32:
      return aoti_torch_dtype_float32();
    case latte::DType::float64:
      return aoti_torch_dtype_float64();
    case latte::DType::bfloat16:
      return aoti_torch_dtype_bfloat16();
    case latte::DType::float16:
      return aoti_torch_dtype_float16();
    case latte::DType::boolean:
      return aoti_torch_dtype_bool();
    case latte::DType::int32:
      return aoti_torch_dtype_int32();
    case latte::DType::int64:
      return aoti_torch_dtype_int64();
  }
  throw std::runtime_error("[latte_ext] got an unknown dtype");
}

// CPU tensors of torch, as cpp/operators takes them.
struct Host {
  using Tensor = torch::stable::Tensor;
  using Optional = std::optional<Tensor>;

  static latte::Tensor view(const Tensor& x) {
    latte::Tensor t;
    t.data = x.data_ptr();
    t.dtype = dtype_of(x.scalar_type());
    t.rank = x.dim();
    // The core refuses a higher rank by name.
    for (int64_t i = 0; i < t.rank && i < 4; ++i) {
      t.shape[i] = x.size(i);
      t.stride[i] = x.stride(i);
    }
    return t;
  }

  static latte::Tensor view(const Optional& x) { return x ? view(*x) : latte::Tensor{}; }

  static Tensor empty(const Tensor&, latte::DType dtype, const latte::operators::Sizes& sizes) {
    latte::operators::Sizes strides(sizes.size());
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
      strides[i] = stride;
      stride *= sizes[i] > 0 ? sizes[i] : 1;
    }
    AtenTensorHandle made = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 torch_dtype(dtype), aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
  }

  static Tensor extra(const Tensor& like, latte::DType dtype,
                      const latte::operators::Sizes& sizes) {
    return empty(like, dtype, sizes);
  }

  static Tensor scratch(const Tensor& like, latte::DType dtype,
                        const latte::operators::Sizes& sizes) {
    return empty(like, dtype, sizes);
  }

  static Tensor empty_like(const Tensor& x) { return torch::stable::empty_like(x); }

  static Tensor clone(const Tensor& x) { return torch::stable::clone(x); }

  static void zero(Tensor& x) { torch::stable::zero_(x); }

  template <class Params, class OnCuda>
  static void call(void (*on_cpu)(const Params&, void*, int), OnCuda, const Params& params) {
    const int threads = static_cast<int>(torch::stable::get_num_threads());
    latte::operators::with_workspace(params, threads,
                                     [&](void* workspace) { on_cpu(params, workspace, threads); });
  }

  template <class Params, class OnCuda>
  static void call(void (*on_cpu)(const Params&), OnCuda, const Params& params) {
    on_cpu(params);
  }
};

template <class Operator, class Signature>
struct Kernel;

template <class Operator, class Result, class... Args>
struct Kernel<Operator, Result (*)(Host&, Args...)> {
  static Result run(Args... args) {
    Host host;
    try {
      return Operator::template run<Host>(host, args...);
    } catch (const latte::Error& error) {
      // What torch's binding makes a ValueError of, if Python is there.
      if (error.kind == latte::Error::Kind::value) throw std::invalid_argument(error.what());
      throw;
    }
  }
};

template <class Operator>
using KernelOf = Kernel<Operator, decltype(&Operator::template run<Host>)>;

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(latte_ext, m) {
  latte::operators::for_each([&]<class Operator>() { m.def(Operator::schema); });
}

STABLE_TORCH_LIBRARY_IMPL(latte_ext, CPU, m) {
  latte::operators::for_each([&]<class Operator>() {
    m.impl(latte::operators::name_of<Operator>().c_str(), TORCH_BOX(&KernelOf<Operator>::run));
  });
}
