// SPDX-License-Identifier: Apache-2.0
// What an operator would raise for its inputs, by the core's own validation. Their memory is not
// looked at: tensors of torch.func and of the meta device have none.
#include <pybind11/pybind11.h>

#include "host.h"
#include "operators/all.h"

namespace latte::python {
namespace {

using Object = const py::object&;

Tensor unread(Object x) { return tensor_from_torch(x, false); }

// Never written: workspace_bytes only checks.
Tensor output_like(const Tensor& x, DType dtype, int64_t channels) {
  Tensor y = x;
  y.dtype = dtype;
  if (x.rank >= 1 && x.rank <= 4) y.shape[x.rank - 1] = channels;
  int64_t stride = 1;
  for (int64_t i = x.rank < 4 ? x.rank - 1 : 3; i >= 0; --i) {
    y.stride[i] = stride;
    stride *= y.shape[i];
  }
  return y;
}

Tensor output_like(const Tensor& x) {
  return output_like(x, x.dtype, x.rank >= 1 && x.rank <= 4 ? x.shape[x.rank - 1] : 0);
}

void latent_attention_check(Object q, Object k, Object v, Object key_mask, Object cu_seqlens,
                            Object max, Object norm, Object mean, bool causal, double scale) {
  LatentAttentionForward p = operators::latent_attention_inputs(
      unread(q), unread(k), unread(v), unread(key_mask), tensor_from_torch(cu_seqlens),
      {unread(max), unread(norm), unread(mean)}, causal, scale);
  p.y = output_like(p.q, p.v.dtype, p.v.shape[3]);
  workspace_bytes(p, 1);
}

void linear_recurrence_check(Object a, Object b, Object cu_seqlens, Object h0) {
  LinearRecurrenceForward p;
  p.a = unread(a);
  p.b = unread(b);
  p.cu_seqlens = tensor_from_torch(cu_seqlens);
  p.initial = unread(h0);
  p.h = output_like(p.b);
  workspace_bytes(p, 1);
}

void rg_lru_check(Object x, Object gate_a, Object gate_x, Object log_lambda, Object key_mask,
                  Object cu_seqlens, Object h0, Object fresh) {
  RgLruForward p = operators::rg_lru_inputs(
      unread(x), unread(gate_a), unread(gate_x), unread(log_lambda), unread(key_mask),
      tensor_from_torch(cu_seqlens), unread(h0), unread(fresh), false);
  p.y = output_like(p.x);
  workspace_bytes(p, 1);
}

void short_conv_check(Object x, Object weight, Object bias, Object cu_seqlens, Object state,
                      bool causal) {
  ShortConvForward p;
  p.x = unread(x);
  p.weight = unread(weight);
  p.bias = unread(bias);
  p.cu_seqlens = tensor_from_torch(cu_seqlens);
  p.initial = unread(state);
  p.y = output_like(p.x);
  p.causal = causal;
  workspace_bytes(p, 1);
}

void sliding_window_check(Object q, Object k, Object v, Object key_mask, Object cu_seqlens,
                          Object q_sink, Object k_sink, Object v_sink, Object sink_position,
                          int64_t window, int64_t past, bool causal, double scale, double softcap) {
  auto p = operators::window_inputs<SlidingWindowForward>(
      unread(q), unread(k), unread(v), unread(key_mask), tensor_from_torch(cu_seqlens),
      {unread(q_sink), unread(k_sink), unread(v_sink), unread(sink_position), Tensor{}},
      {window, past, causal, scale, softcap});
  p.y = output_like(p.q, p.v.dtype, p.v.shape[3]);
  workspace_bytes(p, 1);
}

void rotate_check(Object x, Object position, Object rates, double base, int64_t dim) {
  Rotate p;
  p.x = unread(x);
  p.position = unread(position);
  p.rates = unread(rates);
  p.y = output_like(p.x);
  p.base = base;
  p.dim = dim;
  workspace_bytes(p, 1);
}

}  // namespace

void define_checks(py::module_& m) {
  constexpr const char* kText = "Raises what the operator would raise for these inputs.";
  m.def("latent_attention_check", &latent_attention_check, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("max"), py::arg("norm"),
        py::arg("mean"), py::arg("causal"), py::arg("scale"), kText);
  m.def("linear_recurrence_check", &linear_recurrence_check, py::arg("a"), py::arg("b"),
        py::arg("cu_seqlens"), py::arg("h0"), kText);
  m.def("rg_lru_check", &rg_lru_check, py::arg("x"), py::arg("gate_a"), py::arg("gate_x"),
        py::arg("log_lambda"), py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("h0"),
        py::arg("fresh"), kText);
  m.def("short_conv_check", &short_conv_check, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("cu_seqlens"), py::arg("state"), py::arg("causal"), kText);
  m.def("sliding_window_check", &sliding_window_check, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("q_sink"), py::arg("k_sink"),
        py::arg("v_sink"), py::arg("sink_position"), py::arg("window"), py::arg("past"),
        py::arg("causal"), py::arg("scale"), py::arg("softcap"), kText);
  m.def("rotate_check", &rotate_check, py::arg("x"), py::arg("position"), py::arg("rates"),
        py::arg("base"), py::arg("dim"), kText);
}

}  // namespace latte::python
