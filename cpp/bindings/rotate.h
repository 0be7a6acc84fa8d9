// SPDX-License-Identifier: Apache-2.0
// Rotations on torch tensors.
#pragma once

#include "call.h"
#include "tensor.h"

namespace latte::python {

inline Rotate rotate_inputs(const py::object& x, const py::object& position,
                            const py::object& rates, double base, int64_t dim, bool read = true) {
  Rotate p;
  p.x = tensor_from_torch(x, read);
  p.position = tensor_from_torch(position, read);
  p.rates = tensor_from_torch(rates, read);
  p.base = base;
  p.dim = dim;
  return p;
}

inline void rotate(const py::object& x, const py::object& position, const py::object& rates,
                   const py::object& y, double base, int64_t dim, bool interleaved, bool inverse,
                   const py::object& where) {
  Rotate p = rotate_inputs(x, position, rates, base, dim);
  p.y = tensor_from_torch(y);
  p.interleaved = interleaved;
  p.inverse = inverse;
  call(latte::rotate, cuda::rotate, p, where);
}

inline void rotate_check(const py::object& x, const py::object& position, const py::object& rates,
                         double base, int64_t dim) {
  Rotate p = rotate_inputs(x, position, rates, base, dim, false);
  p.y = output_like(p.x);
  workspace_bytes(p, 1);
}

inline void define_rotate(py::module_& m) {
  m.def("rotate", &rotate, py::arg("x"), py::arg("position"), py::arg("rates"), py::arg("y"),
        py::arg("base"), py::arg("dim"), py::arg("interleaved"), py::arg("inverse"),
        py::arg("where"), "Writes y.");
  m.def("rotate_check", &rotate_check, py::arg("x"), py::arg("position"), py::arg("rates"),
        py::arg("base"), py::arg("dim"), "Raises what the operator would raise for these inputs.");
}

}  // namespace latte::python
