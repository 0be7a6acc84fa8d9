// SPDX-License-Identifier: Apache-2.0
// latte_ext._core: one call per function of latte.h, on the memory of torch tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "call.h"
#include "latte/latte.h"
#include "mixers.h"
#include "rotate.h"
#include "tensor.h"

namespace latte::python {
namespace {

State state(const py::object& max, const py::object& norm, const py::object& mean,
            bool read = true) {
  return {tensor_from_torch(max, read), tensor_from_torch(norm, read),
          tensor_from_torch(mean, read)};
}

LatentAttentionForward inputs(const py::object& q, const py::object& k, const py::object& v,
                              const py::object& key_mask, const py::object& cu_seqlens,
                              const py::object& max, const py::object& norm, const py::object& mean,
                              bool causal, double scale, bool read = true) {
  LatentAttentionForward p;
  p.q = tensor_from_torch(q, read);
  p.k = tensor_from_torch(k, read);
  p.v = tensor_from_torch(v, read);
  p.key_mask = tensor_from_torch(key_mask, read);
  p.cu_seqlens = tensor_from_torch(cu_seqlens);
  p.initial = state(max, norm, mean, read);
  p.causal = causal;
  p.scale = scale;
  return p;
}

void check(const py::object& q, const py::object& k, const py::object& v,
           const py::object& key_mask, const py::object& cu_seqlens, const py::object& max,
           const py::object& norm, const py::object& mean, bool causal, double scale) {
  LatentAttentionForward p =
      inputs(q, k, v, key_mask, cu_seqlens, max, norm, mean, causal, scale, false);
  p.y = p.q;  // never written: workspace_bytes only checks
  p.y.dtype = p.v.dtype;
  p.y.shape[3] = p.v.shape[3];
  for (int i = 3; i >= 0; --i) p.y.stride[i] = i == 3 ? 1 : p.y.stride[i + 1] * p.y.shape[i + 1];
  workspace_bytes(p, 1);
}

void forward(const py::object& q, const py::object& k, const py::object& v,
             const py::object& key_mask, const py::object& cu_seqlens, const py::object& max,
             const py::object& norm, const py::object& mean, const py::object& y,
             const py::object& final_max, const py::object& final_norm,
             const py::object& final_mean, bool causal, double scale, const py::object& where) {
  LatentAttentionForward p = inputs(q, k, v, key_mask, cu_seqlens, max, norm, mean, causal, scale);
  p.y = tensor_from_torch(y);
  p.final = state(final_max, final_norm, final_mean);
  call(latent_attention_forward, cuda::latent_attention_forward, p, where);
}

void backward(const py::object& q, const py::object& k, const py::object& v,
              const py::object& key_mask, const py::object& cu_seqlens, const py::object& max,
              const py::object& norm, const py::object& mean, const py::object& dy,
              const py::object& d_final_norm, const py::object& d_final_mean, const py::object& dq,
              const py::object& dk, const py::object& dv, const py::object& d_norm,
              const py::object& d_mean, bool causal, double scale, const py::object& where) {
  const LatentAttentionForward forward =
      inputs(q, k, v, key_mask, cu_seqlens, max, norm, mean, causal, scale);
  LatentAttentionBackward p;
  p.q = forward.q;
  p.k = forward.k;
  p.v = forward.v;
  p.key_mask = forward.key_mask;
  p.cu_seqlens = forward.cu_seqlens;
  p.initial = forward.initial;
  p.dy = tensor_from_torch(dy);
  p.d_final = state(py::none(), d_final_norm, d_final_mean);
  p.dq = tensor_from_torch(dq);
  p.dk = tensor_from_torch(dk);
  p.dv = tensor_from_torch(dv);
  p.d_initial = state(py::none(), d_norm, d_mean);
  p.causal = causal;
  p.scale = scale;
  call(latent_attention_backward, cuda::latent_attention_backward, p, where);
}

void step(const py::object& q, const py::object& k, const py::object& v, const py::object& max,
          const py::object& norm, const py::object& mean, const py::object& y, double scale,
          const py::object& where) {
  LatentAttentionStep p;
  p.q = tensor_from_torch(q);
  p.k = tensor_from_torch(k);
  p.v = tensor_from_torch(v);
  p.state = state(max, norm, mean);
  p.y = tensor_from_torch(y);
  p.scale = scale;
  call(latent_attention_step, cuda::latent_attention_step, p, where);
}

void merge(const py::object& max, const py::object& norm, const py::object& mean,
           const py::object& other_max, const py::object& other_norm, const py::object& other_mean,
           const py::object& out_max, const py::object& out_norm, const py::object& out_mean,
           const py::object& where) {
  const StateMerge p{state(max, norm, mean), state(other_max, other_norm, other_mean),
                     state(out_max, out_norm, out_mean)};
  call(state_merge, cuda::state_merge, p, where);
}

// A method of a tensor by its interned name.
template <class... Args>
py::object call_method(PyObject* name, const py::handle& tensor, const Args&... args) {
  PyObject* const stack[] = {tensor.ptr(), args.ptr()...};
  PyObject* const result = PyObject_VectorcallMethod(name, stack, 1 + sizeof...(args), nullptr);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Memory that means what it says: read in place, and not lazily negated.
bool plain(const py::handle& object, Tensor& t) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  return read_through_dlpack(object.ptr(), t, Devices::cpu) &&
         call_method(is_neg, object).is(py::handle(Py_False));
}

// y, or None with nothing written, if the call is not one of plain CPU tensors that fit together.
py::object step_plain(const py::handle& q, const py::handle& k, const py::handle& v,
                      const py::handle& max, const py::handle& norm, const py::handle& mean,
                      double scale, int threads) {
  static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
  LatentAttentionStep p;
  if (!plain(q, p.q) || !plain(k, p.k) || !plain(v, p.v) || !plain(max, p.state.max) ||
      !plain(norm, p.state.norm) || !plain(mean, p.state.mean) || p.q.rank != 3 || p.v.rank != 3)
    return py::none();
  p.scale = scale;
  // Three integers: torch takes 0.3 us longer to read them from a tuple.
  const py::object y = call_method(new_empty, v, py::int_(p.q.shape[0]), py::int_(p.q.shape[1]),
                                   py::int_(p.v.shape[2]));
  p.y = tensor_from_torch(y);
  try {
    call_on_cpu(latent_attention_step, p, threads);
  } catch (const Error&) {
    return py::none();
  }
  return y;
}

py::dict cuda_info() {
  using namespace py::literals;
  const cuda::Info info = cuda::info();
  return py::dict("architectures"_a = info.architectures, "emulated"_a = info.emulated,
                  "runtime"_a = info.runtime, "driver"_a = info.driver, "devices"_a = info.devices,
                  "error"_a = info.error);
}

void translate(const Error& error) {
  PyObject* type = error.kind == Error::Kind::value  ? PyExc_ValueError
                   : error.kind == Error::Kind::type ? PyExc_TypeError
                                                     : PyExc_RuntimeError;
  PyErr_SetString(type, error.what());
}

}  // namespace
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
  m.def("latent_attention_forward", &forward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("max"), py::arg("norm"),
        py::arg("mean"), py::arg("y"), py::arg("final_max"), py::arg("final_norm"),
        py::arg("final_mean"), py::arg("causal"), py::arg("scale"), py::arg("where"),
        "Writes y and the final state.");
  m.def("latent_attention_check", &check, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("max"), py::arg("norm"),
        py::arg("mean"), py::arg("causal"), py::arg("scale"),
        "Raises what latent_attention_forward would raise for these inputs.");
  m.def("latent_attention_backward", &backward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("max"), py::arg("norm"),
        py::arg("mean"), py::arg("dy"), py::arg("d_final_norm"), py::arg("d_final_mean"),
        py::arg("dq"), py::arg("dk"), py::arg("dv"), py::arg("d_norm"), py::arg("d_mean"),
        py::arg("causal"), py::arg("scale"), py::arg("where"),
        "Writes dq, dk, dv and the gradient of the initial state.");
  m.def("latent_attention_step", &step, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("max"),
        py::arg("norm"), py::arg("mean"), py::arg("y"), py::arg("scale"), py::arg("where"),
        "Updates the state in place and writes y.");
  m.def("state_merge", &merge, py::arg("max"), py::arg("norm"), py::arg("mean"),
        py::arg("other_max"), py::arg("other_norm"), py::arg("other_mean"), py::arg("out_max"),
        py::arg("out_norm"), py::arg("out_mean"), py::arg("where"),
        "Writes the state of the tokens of both.");
  m.def("latent_attention_step_plain", &step_plain, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("max"), py::arg("norm"), py::arg("mean"), py::arg("scale"), py::arg("threads"),
        "Updates the state in place and returns y; None, and nothing written, unless every "
        "argument is a plain CPU tensor and they fit together.");
  define_mixers(m);
  define_rotate(m);
  define_window(m);
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
