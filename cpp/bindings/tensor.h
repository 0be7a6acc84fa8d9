// SPDX-License-Identifier: Apache-2.0
// A torch.Tensor, or None, as latte::Tensor. Needs no torch header: the four attributes that every
// version of torch has are read through the Python C API.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "latte/latte.h"

namespace latte::python {

namespace py = pybind11;

inline DType dtype_from_torch(const py::handle& dtype) {
  // Interned dtype objects of torch, in the order of DType; looked up once.
  static const py::object* const kinds = [] {
    static py::object table[7];
    const py::module_ torch = py::module_::import("torch");
    const char* names[] = {"float32", "float64", "bfloat16", "float16", "bool", "int32", "int64"};
    for (int i = 0; i < 7; ++i) table[i] = torch.attr(names[i]);
    return new py::object[7]{table[0], table[1], table[2], table[3], table[4], table[5], table[6]};
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
