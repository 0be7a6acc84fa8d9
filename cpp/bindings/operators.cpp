// SPDX-License-Identifier: Apache-2.0
// Every operator three times, as functions of Python's own calling convention (pybind11's costs a
// call of ten arguments 0.3 us):
//   <name>(arguments..., where, out)    a kernel, wherever its tensors are
//   <name>_cpu(arguments...)            the same on the threads that torch has: a CPU kernel for
//                                       torch's dispatcher
//   <name>_direct(arguments..., extras) a call around the dispatcher
#include <pybind11/pybind11.h>

#include <array>
#include <tuple>
#include <type_traits>
#include <utility>

#include "host.h"
#include "operators/all.h"

namespace latte::python {
namespace {

py::object attribute(const char* module, const char* name) {
  return py::getattr(py::module_::import(module), name, py::none());
}

py::object called(const py::object& function) {
  PyObject* const result = PyObject_CallNoArgs(function.ptr());
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// torch.get_num_threads(), asked at every call.
py::object threads() {
  static const auto* const function = new py::object(attribute("torch", "get_num_threads"));
  return called(*function);
}

// Whether autograd records: torch.is_grad_enabled().
bool recording() {
  static const auto* const function = new py::object(attribute("torch", "is_grad_enabled"));
  return called(*function).ptr() == Py_True;
}

// Whether torch's dispatcher would do no more than call a kernel: no mode, transform, trace,
// profiler or level of forward-mode AD is active. What tells it is private to torch, so it may go:
// then no call is direct.
bool dispatcher_is_idle() {
  struct Probes {
    // Of torch._C, and what each of them returns when there is nothing.
    std::array<std::pair<py::object, py::object>, 5> functions;
    py::object forward_ad;
    PyObject* level = interned("_current_level");
    bool complete = true;

    Probes() : forward_ad(py::module_::import("torch.autograd.forward_ad")) {
      const py::object zero = py::int_(0), no = py::bool_(false);
      functions = {{{attribute("torch._C", "_len_torch_dispatch_stack"), zero},
                    {attribute("torch._C", "_len_torch_function_stack"), zero},
                    {attribute("torch._C", "_are_functorch_transforms_active"), no},
                    {attribute("torch._C", "_get_tracing_state"), py::none()},
                    {attribute("torch._C._autograd", "_profiler_enabled"), no}}};
      for (const auto& probe : functions) complete &= !probe.first.is_none();
      complete &= py::hasattr(forward_ad, "_current_level");
    }
  };
  static const auto* const probes = new Probes();
  if (!probes->complete) return false;
  for (const auto& [function, nothing] : probes->functions)
    if (!called(function).is(nothing)) return false;
  const auto level =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(probes->forward_ad.ptr(), probes->level));
  return level && PyLong_AsLong(level.ptr()) < 0;
}

// Autograd then refuses a backward pass that saved one of the tensors before this update.
// Inference tensors count no updates and are passed over. torch's public function first asks what
// it is given, in 0.2 us.
void mark_updated(const py::list& tensors) {
  static const auto* const function = [] {
    const py::object inner = attribute("torch._C", "_increment_version");
    return new py::object(inner.is_none() ? attribute("torch.autograd.graph", "increment_version")
                                          : inner);
  }();
  if (!py::reinterpret_steal<py::object>(PyObject_CallOneArg(function->ptr(), tensors.ptr())))
    throw py::error_already_set();
}

// The argument of an operator; NotPlain if its schema would not take it.
template <class Arg>
Arg strictly(const py::object& x) {
  PyObject* const p = x.ptr();
  if constexpr (std::is_same_v<Arg, const py::object&>) {
    return x;
  } else if constexpr (std::is_same_v<Arg, std::optional<int64_t>>) {
    return x.is_none() ? Arg{} : Arg{strictly<int64_t>(x)};
  } else {
    if constexpr (std::is_same_v<Arg, bool>) {
      if (PyBool_Check(p)) return p == Py_True;
    } else if constexpr (std::is_same_v<Arg, int64_t>) {
      int overflow = 0;
      if (PyLong_CheckExact(p)) {
        const int64_t value = PyLong_AsLongLongAndOverflow(p, &overflow);
        if (!overflow) return value;
      }
    } else {
      static_assert(std::is_same_v<Arg, double>);
      if (PyFloat_Check(p)) return PyFloat_AS_DOUBLE(p);
    }
    throw Host::NotPlain();
  }
}

py::object as_object(py::object result) { return result; }

template <class... Results>
py::object as_object(std::tuple<Results...> results) {
  return std::apply([](auto&... x) { return py::make_tuple(std::move(x)...); }, results);
}

// A result for Python, or null with an exception set.
template <class Function>
PyObject* guarded(const Function& function) {
  try {
    return function().release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const Error& error) {
    translate(error);
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  return nullptr;
}

template <class Operator, class Signature = decltype(&Operator::template run<Host>)>
struct Entry;

template <class Operator, class Result, class... Args>
struct Entry<Operator, Result (*)(Host&, Args...)> {
  static constexpr Py_ssize_t kArity = sizeof...(Args);
  using Objects = std::array<py::object, sizeof...(Args)>;
  using Indices = std::index_sequence_for<Args...>;

  static PyObject* kernel(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&] {
      Host host(given(args, count, 2)[kArity], args[kArity + 1]);
      return run(host, args);
    });
  }

  static PyObject* cpu(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&] {
      given(args, count, 0);
      const py::object where = threads();
      Host host(where, py::none());
      py::object results = run(host, args);
      mark_updated(args);
      return results;
    });
  }

  static PyObject* direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([&]() -> py::object {
      const bool extras = given(args, count, 1)[kArity] == Py_True;
      if (!dispatcher_is_idle()) return py::none();
      const py::object where = threads();
      Host host(where, recording(), extras);
      py::object results;
      try {
        results = call(host, args, Indices{});
      } catch (const Host::NotPlain&) {
        return py::none();
      } catch (const Error&) {
        // The operator answers, after the checks of its public function.
        return py::none();
      }
      mark_updated(args);
      return results;
    });
  }

 private:
  static PyObject* const* given(PyObject* const* args, Py_ssize_t count, Py_ssize_t more) {
    if (count != kArity + more)
      throw py::type_error("[" + operators::name_of<Operator>() + "] got " + std::to_string(count) +
                           " arguments, expected " + std::to_string(kArity + more));
    return args;
  }

  static py::object run(Host& host, PyObject* const* args) {
    try {
      return call(host, args, Indices{});
    } catch (const Host::NotPlain&) {
      throw py::type_error("[" + operators::name_of<Operator>() +
                           "] got arguments of other types, expected " + Operator::schema);
    }
  }

  template <size_t... I>
  static py::object call(Host& host, PyObject* const* args, std::index_sequence<I...>) {
    const Objects objects{py::reinterpret_borrow<py::object>(args[I])...};
    return as_object(Operator::template run<Host>(host, strictly<Args>(objects[I])...));
  }

  static void mark_updated(PyObject* const* args) {
    static const std::vector<int> written = operators::written<Operator>();
    if (written.empty()) return;
    py::list tensors;
    for (const int i : written)
      if (args[i] != Py_None) tensors.append(py::handle(args[i]));
    python::mark_updated(tensors);
  }
};

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

void add(py::module_& m, const std::string& name, Fast function, const char* text) {
  // Python keeps the pointers.
  auto* const kept = new std::string(name);
  auto* const method = new PyMethodDef{
      kept->c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
      METH_FASTCALL, text};
  m.attr(kept->c_str()) = py::reinterpret_steal<py::object>(
      PyCFunction_NewEx(method, nullptr, m.attr("__name__").ptr()));
}

}  // namespace

void define_operators(py::module_& m) {
  py::dict schemas;
  operators::for_each([&]<class Operator>() {
    const std::string name = operators::name_of<Operator>();
    schemas[name.c_str()] = Operator::schema;
    add(m, name, &Entry<Operator>::kernel, Operator::schema);
    add(m, name + "_cpu", &Entry<Operator>::cpu, Operator::schema);
    add(m, name + "_direct", &Entry<Operator>::direct,
        "The results; None, and nothing written, where the dispatcher would do more than call the "
        "kernel, and unless every tensor is a plain one of the CPU and they fit together. Last "
        "argument: whether all results are wanted.");
  });
  m.attr("SCHEMAS") = schemas;
}

}  // namespace latte::python
