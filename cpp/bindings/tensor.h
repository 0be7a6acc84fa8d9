// SPDX-License-Identifier: Apache-2.0
// A torch.Tensor, or None, as latte::Tensor. Needs no torch header: the four attributes that every
// version of torch has are read through the Python C API.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "latte/latte.h"

namespace latte::python {

namespace py = pybind11;

inline DType dtype_from_torch(const py::handle& dtype) {
  // torch's dtype objects in the order of DType, looked up once and never released: they outlive
  // the interpreter's shutdown.
  static const py::object* const kinds = [] {
    const py::module_ torch = py::module_::import("torch");
    return new py::object[7]{torch.attr("float32"), torch.attr("float64"), torch.attr("bfloat16"),
                             torch.attr("float16"), torch.attr("bool"),    torch.attr("int32"),
                             torch.attr("int64")};
  }();
  for (int i = 0; i < 7; ++i)
    if (kinds[i].is(dtype)) return static_cast<DType>(i);
  throw py::type_error("[latte_ext] got a tensor of " + py::str(dtype).cast<std::string>() +
                       ", expected torch.float32, float64, bfloat16, float16, bool, int32 or "
                       "int64");
}

// `read`: whether the memory will be looked at. If not, a tensor without storage (meta, fake, or
// wrapped by a torch.func transform) is welcome, and `data` is a placeholder.
inline Tensor tensor_from_torch(const py::handle& object, bool read = true) {
  static char placeholder;
  Tensor t;
  if (object.is_none()) return t;
  t.data =
      read ? reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>()) : &placeholder;
  t.dtype = dtype_from_torch(object.attr("dtype"));
  const py::tuple shape = object.attr("shape");
  const py::tuple stride = object.attr("stride")();
  t.rank = static_cast<int64_t>(shape.size());
  // Every argument has at most 4 dimensions; the validation refuses a higher rank by name.
  for (size_t i = 0; i < shape.size() && i < 4; ++i) {
    t.shape[i] = shape[i].cast<int64_t>();
    t.stride[i] = stride[i].cast<int64_t>();
  }
  return t;
}

}  // namespace latte::python
