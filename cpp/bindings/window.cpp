// SPDX-License-Identifier: Apache-2.0
// Windows and Macchiato, on the memory of torch tensors.
#include <pybind11/pybind11.h>

#include "call.h"
#include "latte/latte.h"
#include "tensor.h"

namespace latte::python {
namespace {

using Object = const py::object&;

SlidingWindowForward window_inputs(Object q, Object k, Object v, Object key_mask, Object cu_seqlens,
                                   Object q_sink, Object k_sink, Object v_sink,
                                   Object sink_position, Object start, int64_t window, int64_t past,
                                   bool causal, double scale, double softcap, bool read = true) {
  SlidingWindowForward p;
  p.q = tensor_from_torch(q, read);
  p.k = tensor_from_torch(k, read);
  p.v = tensor_from_torch(v, read);
  p.key_mask = tensor_from_torch(key_mask, read);
  p.cu_seqlens = tensor_from_torch(cu_seqlens);
  p.q_sink = tensor_from_torch(q_sink, read);
  p.k_sink = tensor_from_torch(k_sink, read);
  p.v_sink = tensor_from_torch(v_sink, read);
  p.sink_position = tensor_from_torch(sink_position, read);
  p.start = tensor_from_torch(start);
  p.window = window;
  p.past = past;
  p.causal = causal;
  p.scale = scale;
  p.softcap = softcap;
  return p;
}

SlidingWindowBackward window_gradient(const SlidingWindowForward& inputs, Object log_sum,
                                      Object wide, Object dy, Object d_log_sum, Object dq,
                                      Object dk, Object dv, Object dq_sink, Object dk_sink,
                                      Object dv_sink) {
  SlidingWindowBackward p;
  p.q = inputs.q;
  p.k = inputs.k;
  p.v = inputs.v;
  p.key_mask = inputs.key_mask;
  p.cu_seqlens = inputs.cu_seqlens;
  p.q_sink = inputs.q_sink;
  p.k_sink = inputs.k_sink;
  p.v_sink = inputs.v_sink;
  p.sink_position = inputs.sink_position;
  p.start = inputs.start;
  p.window = inputs.window;
  p.past = inputs.past;
  p.causal = inputs.causal;
  p.scale = inputs.scale;
  p.softcap = inputs.softcap;
  p.log_sum = tensor_from_torch(log_sum);
  p.wide = tensor_from_torch(wide);
  p.dy = tensor_from_torch(dy);
  p.d_log_sum = tensor_from_torch(d_log_sum);
  p.dq = tensor_from_torch(dq);
  p.dk = tensor_from_torch(dk);
  p.dv = tensor_from_torch(dv);
  p.dq_sink = tensor_from_torch(dq_sink);
  p.dk_sink = tensor_from_torch(dk_sink);
  p.dv_sink = tensor_from_torch(dv_sink);
  return p;
}

// A tensor that a check stands in for an output with.
Tensor output_like(const Tensor& q, const Tensor& v, DType dtype) {
  Tensor y = q;
  y.dtype = dtype;
  y.shape[3] = v.shape[3];
  for (int i = 3; i >= 0; --i) y.stride[i] = i == 3 ? 1 : y.stride[i + 1] * y.shape[i + 1];
  return y;
}

void check(Object q, Object k, Object v, Object key_mask, Object cu_seqlens, Object q_sink,
           Object k_sink, Object v_sink, Object sink_position, int64_t window, int64_t past,
           bool causal, double scale, double softcap) {
  SlidingWindowForward p =
      window_inputs(q, k, v, key_mask, cu_seqlens, q_sink, k_sink, v_sink, sink_position,
                    py::none(), window, past, causal, scale, softcap, false);
  p.y = output_like(p.q, p.v, p.v.dtype);
  workspace_bytes(p, 1);
}

void forward(Object q, Object k, Object v, Object key_mask, Object cu_seqlens, Object q_sink,
             Object k_sink, Object v_sink, Object sink_position, Object start, Object y,
             Object log_sum, Object wide, int64_t window, int64_t past, bool causal, double scale,
             double softcap, Object where) {
  SlidingWindowForward p =
      window_inputs(q, k, v, key_mask, cu_seqlens, q_sink, k_sink, v_sink, sink_position, start,
                    window, past, causal, scale, softcap);
  p.y = tensor_from_torch(y);
  p.log_sum = tensor_from_torch(log_sum);
  p.wide = tensor_from_torch(wide);
  call(sliding_window_forward, cuda::sliding_window_forward, p, where);
}

void backward(Object q, Object k, Object v, Object key_mask, Object cu_seqlens, Object q_sink,
              Object k_sink, Object v_sink, Object sink_position, Object start, Object log_sum,
              Object wide, Object dy, Object d_log_sum, Object dq, Object dk, Object dv,
              Object dq_sink, Object dk_sink, Object dv_sink, int64_t window, int64_t past,
              bool causal, double scale, double softcap, Object where) {
  call(sliding_window_backward, cuda::sliding_window_backward,
       window_gradient(window_inputs(q, k, v, key_mask, cu_seqlens, q_sink, k_sink, v_sink,
                                     sink_position, start, window, past, causal, scale, softcap),
                       log_sum, wide, dy, d_log_sum, dq, dk, dv, dq_sink, dk_sink, dv_sink),
       where);
}

SlidingWindowStep step_inputs(Object q, Object k, Object v, Object key, Object value, Object valid,
                              Object position, Object q_sink, Object k_sink, Object v_sink,
                              Object sink_position, Object y, double scale, double softcap) {
  SlidingWindowStep p;
  p.q = tensor_from_torch(q);
  p.k = tensor_from_torch(k);
  p.v = tensor_from_torch(v);
  p.ring = {tensor_from_torch(key), tensor_from_torch(value), tensor_from_torch(valid),
            tensor_from_torch(position)};
  p.q_sink = tensor_from_torch(q_sink);
  p.k_sink = tensor_from_torch(k_sink);
  p.v_sink = tensor_from_torch(v_sink);
  p.sink_position = tensor_from_torch(sink_position);
  p.y = tensor_from_torch(y);
  p.scale = scale;
  p.softcap = softcap;
  return p;
}

void step(Object q, Object k, Object v, Object key, Object value, Object valid, Object position,
          Object q_sink, Object k_sink, Object v_sink, Object sink_position, Object y, double scale,
          double softcap, Object where) {
  call(sliding_window_step, cuda::sliding_window_step,
       step_inputs(q, k, v, key, value, valid, position, q_sink, k_sink, v_sink, sink_position, y,
                   scale, softcap),
       where);
}

State state(Object max, Object norm, Object mean) {
  return {tensor_from_torch(max), tensor_from_torch(norm), tensor_from_torch(mean)};
}

void gated_forward(Object q_latent, Object k_latent, Object v_latent, Object q, Object k, Object v,
                   Object latent_mask, Object key_mask, Object cu_seqlens, Object max, Object norm,
                   Object mean, Object q_sink, Object k_sink, Object v_sink, Object sink_position,
                   Object start, Object y, Object total, Object log_sum, Object wide,
                   Object final_max, Object final_norm, Object final_mean, int64_t window,
                   int64_t past, bool causal, double scale, double softcap, double latent_scale,
                   Object where) {
  MacchiatoForward p;
  p.q_latent = tensor_from_torch(q_latent);
  p.latent.k = tensor_from_torch(k_latent);
  p.latent.v = tensor_from_torch(v_latent);
  p.latent.key_mask = tensor_from_torch(latent_mask);
  p.latent.initial = state(max, norm, mean);
  p.latent.y = tensor_from_torch(total);
  p.latent.final = state(final_max, final_norm, final_mean);
  p.latent.scale = latent_scale;
  p.window = window_inputs(q, k, v, key_mask, cu_seqlens, q_sink, k_sink, v_sink, sink_position,
                           start, window, past, causal, scale, softcap);
  p.window.y = tensor_from_torch(y);
  p.window.log_sum = tensor_from_torch(log_sum);
  p.window.wide = tensor_from_torch(wide);
  call(macchiato_forward, cuda::macchiato_forward, p, where);
}

void gated_backward(Object q_latent, Object k_latent, Object v_latent, Object q, Object k, Object v,
                    Object latent_mask, Object key_mask, Object cu_seqlens, Object max, Object norm,
                    Object mean, Object q_sink, Object k_sink, Object v_sink, Object sink_position,
                    Object start, Object total, Object log_sum, Object wide, Object dy,
                    Object d_final_norm, Object d_final_mean, Object dq_latent, Object dk_latent,
                    Object dv_latent, Object dq, Object dk, Object dv, Object dq_sink,
                    Object dk_sink, Object dv_sink, Object d_norm, Object d_mean, bool one_value,
                    int64_t window, int64_t past, bool causal, double scale, double softcap,
                    double latent_scale, Object where) {
  MacchiatoBackward p;
  p.one_value = one_value;
  p.q_latent = tensor_from_torch(q_latent);
  p.y = tensor_from_torch(total);
  p.latent.k = tensor_from_torch(k_latent);
  p.latent.v = tensor_from_torch(v_latent);
  p.latent.key_mask = tensor_from_torch(latent_mask);
  p.latent.initial = state(max, norm, mean);
  p.latent.d_final = state(py::none(), d_final_norm, d_final_mean);
  p.latent.dk = tensor_from_torch(dk_latent);
  p.latent.dv = tensor_from_torch(dv_latent);
  p.latent.d_initial = state(py::none(), d_norm, d_mean);
  p.latent.scale = latent_scale;
  p.dq_latent = tensor_from_torch(dq_latent);
  p.window =
      window_gradient(window_inputs(q, k, v, key_mask, cu_seqlens, q_sink, k_sink, v_sink,
                                    sink_position, start, window, past, causal, scale, softcap),
                      log_sum, wide, dy, py::none(), dq, dk, dv, dq_sink, dk_sink, dv_sink);
  call(macchiato_backward, cuda::macchiato_backward, p, where);
}

void gated_step(Object q_latent, Object k_latent, Object v_latent, Object q, Object k, Object v,
                Object max, Object norm, Object mean, Object key, Object value, Object valid,
                Object position, Object q_sink, Object k_sink, Object v_sink, Object sink_position,
                Object y, double scale, double softcap, double latent_scale, Object where) {
  MacchiatoStep p;
  p.q_latent = tensor_from_torch(q_latent);
  p.latent.k = tensor_from_torch(k_latent);
  p.latent.v = tensor_from_torch(v_latent);
  p.latent.state = state(max, norm, mean);
  p.latent.scale = latent_scale;
  p.window = step_inputs(q, k, v, key, value, valid, position, q_sink, k_sink, v_sink,
                         sink_position, y, scale, softcap);
  call(macchiato_step, cuda::macchiato_step, p, where);
}

}  // namespace

void define_window(py::module_& m) {
  m.def("sliding_window_check", &check, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("q_sink"), py::arg("k_sink"),
        py::arg("v_sink"), py::arg("sink_position"), py::arg("window"), py::arg("past"),
        py::arg("causal"), py::arg("scale"), py::arg("softcap"),
        "Raises what sliding_window_forward would raise for these inputs.");
  m.def("sliding_window_forward", &forward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("q_sink"), py::arg("k_sink"),
        py::arg("v_sink"), py::arg("sink_position"), py::arg("start"), py::arg("y"),
        py::arg("log_sum"), py::arg("wide"), py::arg("window"), py::arg("past"), py::arg("causal"),
        py::arg("scale"), py::arg("softcap"), py::arg("where"),
        "Writes y, and log_sum and wide where they are not None.");
  m.def("sliding_window_backward", &backward, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("q_sink"), py::arg("k_sink"),
        py::arg("v_sink"), py::arg("sink_position"), py::arg("start"), py::arg("log_sum"),
        py::arg("wide"), py::arg("dy"), py::arg("d_log_sum"), py::arg("dq"), py::arg("dk"),
        py::arg("dv"), py::arg("dq_sink"), py::arg("dk_sink"), py::arg("dv_sink"),
        py::arg("window"), py::arg("past"), py::arg("causal"), py::arg("scale"), py::arg("softcap"),
        py::arg("where"), "Writes dq, dk and dv, and those of the sinks if there are any.");
  m.def("sliding_window_step", &step, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("key"),
        py::arg("value"), py::arg("valid"), py::arg("position"), py::arg("q_sink"),
        py::arg("k_sink"), py::arg("v_sink"), py::arg("sink_position"), py::arg("y"),
        py::arg("scale"), py::arg("softcap"), py::arg("where"),
        "Updates the ring in place and writes y.");
  m.def("macchiato_forward", &gated_forward, py::arg("q_latent"), py::arg("k_latent"),
        py::arg("v_latent"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("latent_mask"),
        py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("max"), py::arg("norm"),
        py::arg("mean"), py::arg("q_sink"), py::arg("k_sink"), py::arg("v_sink"),
        py::arg("sink_position"), py::arg("start"), py::arg("y"), py::arg("total"),
        py::arg("log_sum"), py::arg("wide"), py::arg("final_max"), py::arg("final_norm"),
        py::arg("final_mean"), py::arg("window"), py::arg("past"), py::arg("causal"),
        py::arg("scale"), py::arg("softcap"), py::arg("latent_scale"), py::arg("where"),
        "Writes y, total and the final state; log_sum and wide if not None.");
  m.def("macchiato_backward", &gated_backward, py::arg("q_latent"), py::arg("k_latent"),
        py::arg("v_latent"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("latent_mask"),
        py::arg("key_mask"), py::arg("cu_seqlens"), py::arg("max"), py::arg("norm"),
        py::arg("mean"), py::arg("q_sink"), py::arg("k_sink"), py::arg("v_sink"),
        py::arg("sink_position"), py::arg("start"), py::arg("total"), py::arg("log_sum"),
        py::arg("wide"), py::arg("dy"), py::arg("d_final_norm"), py::arg("d_final_mean"),
        py::arg("dq_latent"), py::arg("dk_latent"), py::arg("dv_latent"), py::arg("dq"),
        py::arg("dk"), py::arg("dv"), py::arg("dq_sink"), py::arg("dk_sink"), py::arg("dv_sink"),
        py::arg("d_norm"), py::arg("d_mean"), py::arg("one_value"), py::arg("window"),
        py::arg("past"), py::arg("causal"), py::arg("scale"), py::arg("softcap"),
        py::arg("latent_scale"), py::arg("where"),
        "Writes the gradients of all inputs and of the initial state.");
  m.def("macchiato_step", &gated_step, py::arg("q_latent"), py::arg("k_latent"),
        py::arg("v_latent"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("max"),
        py::arg("norm"), py::arg("mean"), py::arg("key"), py::arg("value"), py::arg("valid"),
        py::arg("position"), py::arg("q_sink"), py::arg("k_sink"), py::arg("v_sink"),
        py::arg("sink_position"), py::arg("y"), py::arg("scale"), py::arg("softcap"),
        py::arg("latent_scale"), py::arg("where"), "Updates state and ring in place and writes y.");
}

}  // namespace latte::python
