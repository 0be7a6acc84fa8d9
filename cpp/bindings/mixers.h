// SPDX-License-Identifier: Apache-2.0
// Recurrences and convolutions on torch tensors: one binding per function of latte.h.
#pragma once

#include "call.h"
#include "tensor.h"

namespace latte::python {

inline void linear_recurrence_forward(const py::object& a, const py::object& b,
                                      const py::object& cu_seqlens, const py::object& h0,
                                      const py::object& h, const py::object& final, bool reverse,
                                      const py::object& where) {
  LinearRecurrenceForward p;
  p.a = tensor_from_torch(a);
  p.b = tensor_from_torch(b);
  p.cu_seqlens = tensor_from_torch(cu_seqlens);
  p.initial = tensor_from_torch(h0);
  p.h = tensor_from_torch(h);
  p.final = tensor_from_torch(final);
  p.reverse = reverse;
  call(latte::linear_recurrence_forward, cuda::linear_recurrence_forward, p, where);
}

inline void linear_recurrence_backward(const py::object& a, const py::object& h,
                                       const py::object& cu_seqlens, const py::object& h0,
                                       const py::object& dh, const py::object& d_final,
                                       const py::object& da, const py::object& db,
                                       const py::object& d_h0, bool reverse,
                                       const py::object& where) {
  LinearRecurrenceBackward p;
  p.a = tensor_from_torch(a);
  p.h = tensor_from_torch(h);
  p.cu_seqlens = tensor_from_torch(cu_seqlens);
  p.initial = tensor_from_torch(h0);
  p.dh = tensor_from_torch(dh);
  p.d_final = tensor_from_torch(d_final);
  p.da = tensor_from_torch(da);
  p.db = tensor_from_torch(db);
  p.d_initial = tensor_from_torch(d_h0);
  p.reverse = reverse;
  call(latte::linear_recurrence_backward, cuda::linear_recurrence_backward, p, where);
}

// (B,T,C), or (N,C) as N sequences of one token: a view made in Python costs a step 0.8 us each.
inline Tensor tokens_from_torch(const py::handle& object) {
  Tensor t = tensor_from_torch(object);
  if (t.rank != 2) return t;
  t.rank = 3;
  t.shape[2] = t.shape[1];
  t.stride[2] = t.stride[1];
  t.shape[1] = 1;
  t.stride[1] = t.shape[2] * t.stride[2];
  return t;
}

inline void rg_lru_forward(const py::object& x, const py::object& gate_a, const py::object& gate_x,
                           const py::object& log_lambda, const py::object& key_mask,
                           const py::object& cu_seqlens, const py::object& h0,
                           const py::object& fresh, const py::object& y, const py::object& final,
                           bool reverse, const py::object& where) {
  RgLruForward p;
  p.x = tokens_from_torch(x);
  p.gate_a = tokens_from_torch(gate_a);
  p.gate_x = tokens_from_torch(gate_x);
  p.log_lambda = tensor_from_torch(log_lambda);
  p.key_mask = tensor_from_torch(key_mask);
  p.cu_seqlens = tensor_from_torch(cu_seqlens);
  p.initial = tensor_from_torch(h0);
  p.fresh = tensor_from_torch(fresh);
  p.y = tokens_from_torch(y);
  p.final = tensor_from_torch(final);
  p.reverse = reverse;
  call(latte::rg_lru_forward, cuda::rg_lru_forward, p, where);
}

inline void rg_lru_backward(const py::object& x, const py::object& gate_a, const py::object& gate_x,
                            const py::object& log_lambda, const py::object& key_mask,
                            const py::object& cu_seqlens, const py::object& h0,
                            const py::object& fresh, const py::object& y, const py::object& dy,
                            const py::object& d_final, const py::object& dx,
                            const py::object& d_gate_a, const py::object& d_gate_x,
                            const py::object& d_log_lambda, const py::object& d_h0, bool reverse,
                            const py::object& where) {
  RgLruBackward p;
  p.x = tensor_from_torch(x);
  p.gate_a = tensor_from_torch(gate_a);
  p.gate_x = tensor_from_torch(gate_x);
  p.log_lambda = tensor_from_torch(log_lambda);
  p.key_mask = tensor_from_torch(key_mask);
  p.cu_seqlens = tensor_from_torch(cu_seqlens);
  p.initial = tensor_from_torch(h0);
  p.fresh = tensor_from_torch(fresh);
  p.y = tensor_from_torch(y);
  p.dy = tensor_from_torch(dy);
  p.d_final = tensor_from_torch(d_final);
  p.dx = tensor_from_torch(dx);
  p.d_gate_a = tensor_from_torch(d_gate_a);
  p.d_gate_x = tensor_from_torch(d_gate_x);
  p.d_log_lambda = tensor_from_torch(d_log_lambda);
  p.d_initial = tensor_from_torch(d_h0);
  p.reverse = reverse;
  call(latte::rg_lru_backward, cuda::rg_lru_backward, p, where);
}

inline void short_conv_forward(const py::object& x, const py::object& weight,
                               const py::object& bias, const py::object& cu_seqlens,
                               const py::object& state, const py::object& y,
                               const py::object& final, bool causal, const py::object& where) {
  ShortConvForward p;
  p.x = tokens_from_torch(x);
  p.weight = tensor_from_torch(weight);
  p.bias = tensor_from_torch(bias);
  p.cu_seqlens = tensor_from_torch(cu_seqlens);
  p.initial = tensor_from_torch(state);
  p.y = tokens_from_torch(y);
  p.final = tensor_from_torch(final);
  p.causal = causal;
  call(latte::short_conv_forward, cuda::short_conv_forward, p, where);
}

inline void short_conv_backward(const py::object& x, const py::object& weight,
                                const py::object& cu_seqlens, const py::object& state,
                                const py::object& dy, const py::object& d_final,
                                const py::object& dx, const py::object& d_weight,
                                const py::object& d_bias, const py::object& d_state, bool causal,
                                const py::object& where) {
  ShortConvBackward p;
  p.x = tensor_from_torch(x);
  p.weight = tensor_from_torch(weight);
  p.cu_seqlens = tensor_from_torch(cu_seqlens);
  p.initial = tensor_from_torch(state);
  p.dy = tensor_from_torch(dy);
  p.d_final = tensor_from_torch(d_final);
  p.dx = tensor_from_torch(dx);
  p.d_weight = tensor_from_torch(d_weight);
  p.d_bias = tensor_from_torch(d_bias);
  p.d_initial = tensor_from_torch(d_state);
  p.causal = causal;
  call(latte::short_conv_backward, cuda::short_conv_backward, p, where);
}

inline void linear_recurrence_check(const py::object& a, const py::object& b,
                                    const py::object& cu_seqlens, const py::object& h0) {
  LinearRecurrenceForward p;
  p.a = tensor_from_torch(a, false);
  p.b = tensor_from_torch(b, false);
  p.cu_seqlens = tensor_from_torch(cu_seqlens);
  p.initial = tensor_from_torch(h0, false);
  p.h = output_like(p.b);
  workspace_bytes(p, 1);
}

inline void rg_lru_check(const py::object& x, const py::object& gate_a, const py::object& gate_x,
                         const py::object& log_lambda, const py::object& key_mask,
                         const py::object& cu_seqlens, const py::object& h0,
                         const py::object& fresh) {
  RgLruForward p;
  p.x = tensor_from_torch(x, false);
  p.gate_a = tensor_from_torch(gate_a, false);
  p.gate_x = tensor_from_torch(gate_x, false);
  p.log_lambda = tensor_from_torch(log_lambda, false);
  p.key_mask = tensor_from_torch(key_mask, false);
  p.cu_seqlens = tensor_from_torch(cu_seqlens);
  p.initial = tensor_from_torch(h0, false);
  p.fresh = tensor_from_torch(fresh, false);
  p.y = output_like(p.x);
  workspace_bytes(p, 1);
}

inline void short_conv_check(const py::object& x, const py::object& weight, const py::object& bias,
                             const py::object& cu_seqlens, const py::object& state, bool causal) {
  ShortConvForward p;
  p.x = tensor_from_torch(x, false);
  p.weight = tensor_from_torch(weight, false);
  p.bias = tensor_from_torch(bias, false);
  p.cu_seqlens = tensor_from_torch(cu_seqlens);
  p.initial = tensor_from_torch(state, false);
  p.y = output_like(p.x);
  p.causal = causal;
  workspace_bytes(p, 1);
}

inline void define_mixers(py::module_& m) {
  m.def("linear_recurrence_forward", &linear_recurrence_forward, py::arg("a"), py::arg("b"),
        py::arg("cu_seqlens"), py::arg("h0"), py::arg("h"), py::arg("final"), py::arg("reverse"),
        py::arg("where"), "Writes h and the final state.");
  m.def("linear_recurrence_backward", &linear_recurrence_backward, py::arg("a"), py::arg("h"),
        py::arg("cu_seqlens"), py::arg("h0"), py::arg("dh"), py::arg("d_final"), py::arg("da"),
        py::arg("db"), py::arg("d_h0"), py::arg("reverse"), py::arg("where"),
        "Writes da, db and the gradient of the initial state.");
  m.def("rg_lru_forward", &rg_lru_forward, py::arg("x"), py::arg("gate_a"), py::arg("gate_x"),
        py::arg("log_lambda"), py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("h0"),
        py::arg("fresh"), py::arg("y"), py::arg("final"), py::arg("reverse"), py::arg("where"),
        "Writes y and the final state, which may be h0 itself for one token.");
  m.def("rg_lru_backward", &rg_lru_backward, py::arg("x"), py::arg("gate_a"), py::arg("gate_x"),
        py::arg("log_lambda"), py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("h0"),
        py::arg("fresh"), py::arg("y"), py::arg("dy"), py::arg("d_final"), py::arg("dx"),
        py::arg("d_gate_a"), py::arg("d_gate_x"), py::arg("d_log_lambda"), py::arg("d_h0"),
        py::arg("reverse"), py::arg("where"), "Writes all gradients.");
  m.def("short_conv_forward", &short_conv_forward, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("cu_seqlens"), py::arg("state"), py::arg("y"), py::arg("final"), py::arg("causal"),
        py::arg("where"),
        "Writes y and the final state, which may be `state` itself for one token.");
  constexpr const char* kCheck = "Raises what the operator would raise for these inputs.";
  m.def("linear_recurrence_check", &linear_recurrence_check, py::arg("a"), py::arg("b"),
        py::arg("cu_seqlens"), py::arg("h0"), kCheck);
  m.def("rg_lru_check", &rg_lru_check, py::arg("x"), py::arg("gate_a"), py::arg("gate_x"),
        py::arg("log_lambda"), py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("h0"),
        py::arg("fresh"), kCheck);
  m.def("short_conv_check", &short_conv_check, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("cu_seqlens"), py::arg("state"), py::arg("causal"), kCheck);
  m.def("short_conv_backward", &short_conv_backward, py::arg("x"), py::arg("weight"),
        py::arg("cu_seqlens"), py::arg("state"), py::arg("dy"), py::arg("d_final"), py::arg("dx"),
        py::arg("d_weight"), py::arg("d_bias"), py::arg("d_state"), py::arg("causal"),
        py::arg("where"), "Writes all gradients.");
}

}  // namespace latte::python
