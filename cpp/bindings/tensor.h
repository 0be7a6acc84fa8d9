// SPDX-License-Identifier: Apache-2.0
// A torch.Tensor, or None, as latte::Tensor. Needs no torch header: the tensor is read through
// DLPack's function table (30 ns), or where torch has none (before 2.10) or the tensor does not fit
// it, through the four attributes that every version has (0.7 us).
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "dlpack.h"
#include "latte/latte.h"

namespace latte::python {

namespace py = pybind11;

// torch's table, looked up once; null if this torch has none.
inline const dlpack::ExchangeApi* exchange_api() {
  static const dlpack::ExchangeApi* const api = []() -> const dlpack::ExchangeApi* {
    const py::object capsule =
        py::getattr(py::module_::import("torch").attr("Tensor"), dlpack::kAttribute, py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return nullptr;
    const auto* found = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
    const bool usable = found->version.major == dlpack::kMajorVersion &&
                        found->dltensor_from_py_object_no_sync != nullptr;
    return usable ? found : nullptr;
  }();
  return api;
}

inline bool dtype_from_dlpack(const dlpack::Tensor& t, DType& dtype) {
  static constexpr struct {
    dlpack::TypeCode code;
    int bits;
    DType dtype;
  } kKinds[] = {{dlpack::kFloat, 32, DType::float32},   {dlpack::kFloat, 64, DType::float64},
                {dlpack::kBfloat, 16, DType::bfloat16}, {dlpack::kFloat, 16, DType::float16},
                {dlpack::kBool, 8, DType::boolean},     {dlpack::kInt, 32, DType::int32},
                {dlpack::kInt, 64, DType::int64}};
  for (const auto& kind : kKinds) {
    if (t.type_code != kind.code || t.bits != kind.bits || t.lanes != 1) continue;
    dtype = kind.dtype;
    return true;
  }
  return false;
}

enum class Devices { cpu, cpu_or_cuda };

// False, and no Python exception, unless `object` is a tensor with memory of a supported dtype, on
// the CPU or on CUDA as `devices` allows.
inline bool read_through_dlpack(PyObject* object, Tensor& t, Devices devices) {
  const dlpack::ExchangeApi* const api = exchange_api();
  if (!api) return false;
  dlpack::Tensor view;
  if (api->dltensor_from_py_object_no_sync(object, &view) != 0) {
    PyErr_Clear();
    return false;
  }
  const bool on_cpu = view.device_type == dlpack::kCpu;
  const bool on_cuda = view.device_type == dlpack::kCuda && devices == Devices::cpu_or_cuda;
  if (!view.data || !(on_cpu || on_cuda) || !dtype_from_dlpack(view, t.dtype)) return false;
  t.data = static_cast<char*>(view.data) + view.byte_offset;
  t.rank = view.rank;
  // Every argument has at most 4 dimensions; the validation refuses a higher rank by name.
  for (int i = 0; i < view.rank && i < 4; ++i) {
    t.shape[i] = view.shape[i];
    t.stride[i] = view.strides[i];
  }
  return true;
}

// torch's dtype objects in the order of DType, looked up once and never released: they outlive the
// interpreter's shutdown.
inline const py::object* torch_dtypes() {
  static const py::object* const kinds = [] {
    const py::module_ torch = py::module_::import("torch");
    return new py::object[7]{torch.attr("float32"), torch.attr("float64"), torch.attr("bfloat16"),
                             torch.attr("float16"), torch.attr("bool"),    torch.attr("int32"),
                             torch.attr("int64")};
  }();
  return kinds;
}

inline DType dtype_from_torch(const py::handle& dtype) {
  for (int i = 0; i < 7; ++i)
    if (torch_dtypes()[i].is(dtype)) return static_cast<DType>(i);
  throw py::type_error("[latte_ext] got a tensor of " + py::str(dtype).cast<std::string>() +
                       ", expected torch.float32, float64, bfloat16, float16, bool, int32 or "
                       "int64");
}

// `read`: whether the memory will be looked at. If not, a tensor without storage (meta, fake, or
// wrapped by a torch.func transform) is welcome, and `data` is a placeholder.
inline Tensor tensor_from_torch(const py::handle& object, bool read = true) {
  static char placeholder;
  Tensor t;
  if (object.is_none() || (read && read_through_dlpack(object.ptr(), t, Devices::cpu_or_cuda)))
    return t;
  t.data =
      read ? reinterpret_cast<void*>(object.attr("data_ptr")().cast<uintptr_t>()) : &placeholder;
  t.dtype = dtype_from_torch(object.attr("dtype"));
  const py::tuple shape = object.attr("shape");
  const py::tuple stride = object.attr("stride")();
  t.rank = static_cast<int64_t>(shape.size());
  for (size_t i = 0; i < shape.size() && i < 4; ++i) {
    t.shape[i] = shape[i].cast<int64_t>();
    t.stride[i] = stride[i].cast<int64_t>();
  }
  return t;
}

}  // namespace latte::python
