// SPDX-License-Identifier: Apache-2.0
// torch tensors of Python as the operators of cpp/operators take them.
#pragma once

#include "call.h"
#include "operators/host.h"
#include "tensor.h"

namespace latte::python {

// A method of an object by its interned name, with keyword arguments last if `keywords` names any.
template <class... Args>
py::object call_method(PyObject* name, PyObject* keywords, const py::handle& object,
                       const Args&... args) {
  PyObject* const stack[] = {object.ptr(), args.ptr()...};
  const size_t count = 1 + sizeof...(args) - (keywords ? PyTuple_GET_SIZE(keywords) : 0);
  PyObject* const result = PyObject_VectorcallMethod(name, stack, count, keywords);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

class Host {
 public:
  using Tensor = py::object;
  using Optional = py::object;  // or None

  // What a direct call is given back instead of a result, and nothing has been written: an argument
  // is not a plain CPU tensor.
  struct NotPlain {};

  // For an operator's kernel.
  // where: as `call` takes it. out: None, or a tuple of tensors that take the place of new ones, in
  // the order of the results; None in it is a result that nobody wants.
  Host(const py::handle& where, const py::handle& out)
      : where_(where), out_(out.is_none() ? nullptr : out.ptr()) {}

  // For a call around the dispatcher, which takes only plain tensors, without derivatives to
  // record if `recording`. `extras`: whether the caller has a use for all results.
  Host(const py::handle& threads, bool recording, bool extras)
      : where_(threads), direct_(true), recording_(recording), extras_(extras) {}

  latte::Tensor view(const py::object& x) {
    latte::Tensor t;
    if (!direct_) {
      t = tensor_from_torch(x);
    } else if (!x.is_none() && !read_plain(x, t)) {
      throw NotPlain();
    }
    int64_t elements = t.rank > 0;
    for (int64_t i = 0; i < t.rank && i < 4; ++i) elements *= t.shape[i];
    elements_ += elements;
    return t;
  }

  py::object empty(const py::object& like, DType dtype, const operators::Sizes& sizes) {
    return out_ ? next_given() : allocate(like, dtype, sizes);
  }

  py::object extra(const py::object& like, DType dtype, const operators::Sizes& sizes) {
    return extras_ ? empty(like, dtype, sizes) : py::none();
  }

  py::object scratch(const py::object& like, DType dtype, const operators::Sizes& sizes) const {
    return allocate(like, dtype, sizes);
  }

  py::object empty_like(const py::object& x) {
    static const auto* const function =
        new py::object(py::module_::import("torch").attr("empty_like"));
    if (out_) return next_given();
    PyObject* const result = PyObject_CallOneArg(function->ptr(), x.ptr());
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }

  py::object clone(const py::object& x) const {
    static PyObject* const name = interned("clone");
    return call_method(name, nullptr, x);
  }

  void zero(const py::object& x) const {
    static PyObject* const name = interned("zero_");
    if (!x.is_none()) call_method(name, nullptr, x);
  }

  template <class OnCpu, class OnCuda, class Params>
  void call(OnCpu on_cpu, OnCuda on_cuda, const Params& params) const {
    python::call(on_cpu, on_cuda, params, where_, elements_);
  }

 private:
  // Memory that means what it says: of torch.Tensor or torch.nn.Parameter itself, on the CPU, read
  // in place, not lazily negated, and not to be differentiated.
  bool read_plain(const py::handle& x, latte::Tensor& t) const {
    static PyObject* const is_neg = interned("is_neg");
    static PyObject* const requires_grad = interned("requires_grad");
    static const auto* const types = new py::object[2]{
        py::module_::import("torch").attr("Tensor"),
        py::module_::import("torch.nn").attr("Parameter"),
    };
    const py::handle type = py::type::handle_of(x);
    if (!type.is(types[0]) && !type.is(types[1])) return false;
    if (!read_through_dlpack(x.ptr(), t, Devices::cpu)) return false;
    if (!call_method(is_neg, nullptr, x).is(py::handle(Py_False))) return false;
    if (!recording_) return true;
    const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(x.ptr(), requires_grad));
    return found.is(py::handle(Py_False));
  }

  py::object next_given() {
    if (next_ >= PyTuple_GET_SIZE(out_))
      throw py::value_error("[latte_ext] got " + std::to_string(next_) +
                            " tensors in out, expected one for every result");
    return py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(out_, next_++));
  }

  static py::object allocate(const py::object& like, DType dtype, const operators::Sizes& sizes) {
    static PyObject* const new_empty = interned("new_empty");
    static PyObject* const dtype_only = PyTuple_Pack(1, interned("dtype"));
    PyObject* keywords = nullptr;
    // Integers: torch takes 0.3 us longer to read them from a tuple.
    PyObject* stack[6] = {like.ptr()};
    py::object owned[4];
    size_t count = 1;
    for (const int64_t size : sizes) {
      owned[count - 1] = py::int_(size);
      stack[count] = owned[count - 1].ptr();
      ++count;
    }
    latte::Tensor t;
    if (!read_through_dlpack(like.ptr(), t, Devices::cpu_or_cuda) || t.dtype != dtype) {
      stack[count] = torch_dtypes()[static_cast<int>(dtype)].ptr();
      keywords = dtype_only;
    }
    PyObject* const result = PyObject_VectorcallMethod(new_empty, stack, count, keywords);
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }

  py::handle where_;
  PyObject* out_ = nullptr;
  Py_ssize_t next_ = 0;
  int64_t elements_ = 0;  // of the tensors viewed so far
  bool direct_ = false, recording_ = false, extras_ = true;
};

// Sets Python's exception of the error's kind.
void translate(const Error& error);

// Of operators.cpp and checks.cpp.
void define_operators(py::module_& m);
void define_checks(py::module_& m);

}  // namespace latte::python
