// SPDX-License-Identifier: Apache-2.0
// latte_ext._core: the operators on torch tensors, and what there is to know of the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host.h"

namespace latte::python {
namespace {

py::dict cuda_info() {
  using namespace py::literals;
  const cuda::Info info = cuda::info();
  return py::dict("architectures"_a = info.architectures, "emulated"_a = info.emulated,
                  "runtime"_a = info.runtime, "driver"_a = info.driver, "devices"_a = info.devices,
                  "error"_a = info.error);
}

}  // namespace

void translate(const Error& error) {
  PyObject* type = error.kind == Error::Kind::value  ? PyExc_ValueError
                   : error.kind == Error::Kind::type ? PyExc_TypeError
                                                     : PyExc_RuntimeError;
  PyErr_SetString(type, error.what());
}

}  // namespace latte::python

PYBIND11_MODULE(_core, m) {
  namespace py = pybind11;
  using namespace latte::python;
  m.doc() = "The compiled core of latte_ext, on torch tensors and None.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const latte::Error& error) {
      translate(error);
    }
  });
  py::class_<Stream>(m, "Stream", "A stream of a CUDA device, and how to allocate in its order.")
      .def(py::init<int, uintptr_t, py::object>(), py::arg("device"), py::arg("handle"),
           py::arg("allocate"));
  define_operators(m);
  define_checks(m);
  m.def("version", &latte::version, "Version of the core.");
  m.def("cpu_isa", &latte::cpu_isa, "Instruction set of the CPU kernels in use.");
  m.def("fma_rate", &latte::fma_rate, py::arg("threads"), py::arg("seconds"),
        py::call_guard<py::gil_scoped_release>(),
        "Float32 operations per second that multiply-adds in registers reach, measured.");
  m.def("cuda_built", &latte::cuda_built, "Whether the CUDA backend is in this build.");
  m.def("cuda_info", &cuda_info, "What this build and this machine have of CUDA.");
  m.def(
      "cuda_tuning",
      [] {
        const latte::cuda::Tuning t = latte::cuda::tuning();
        return py::make_tuple(t.wanted_blocks, t.min_segment_tokens);
      },
      "(wanted_blocks, min_segment_tokens) of the CUDA kernels.");
  m.def(
      "set_cuda_tuning",
      [](int64_t wanted_blocks, int64_t min_segment_tokens) {
        latte::cuda::set_tuning({wanted_blocks, min_segment_tokens});
      },
      py::arg("wanted_blocks"), py::arg("min_segment_tokens"),
      "For measurements: how later calls cut long sequences.");
}
