// SPDX-License-Identifier: Apache-2.0
// One call of the core: on the CPU or a CUDA device, with workspace, without the interpreter's
// lock unless the call is short.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

#include "latte/cuda.h"
#include "latte/latte.h"
#include "operators/workspace.h"

namespace latte::python {

namespace py = pybind11;

// Elements of all tensors up to which a call on the CPU keeps the interpreter's lock: to give it up
// and take it back costs 0.7 us. A step touches each element once, in 10 us; other operators take 5
// to 25 us, a window of 1,365 tokens of one channel, the dearest, 0.45 ms.
template <class Params>
inline constexpr int64_t kShortCall = 4096;
template <>
inline constexpr int64_t kShortCall<LatentAttentionStep> = 65536;
template <>
inline constexpr int64_t kShortCall<SlidingWindowStep> = 65536;
template <>
inline constexpr int64_t kShortCall<MacchiatoStep> = 65536;

template <class Params>
void call_on_cpu(void (*run)(const Params&, void*, int), const Params& params, int threads,
                 int64_t elements) {
  operators::with_workspace(params, threads, [&](void* workspace) {
    std::optional<py::gil_scoped_release> release;
    if (elements > kShortCall<Params>) release.emplace();
    run(params, workspace, threads);
  });
}

// A stream of a CUDA device. allocate(bytes) makes a tensor whose memory is free for others in the
// order of this stream, as that of torch.empty is if the stream is torch's current one.
struct Stream {
  int device;
  uintptr_t handle;
  py::object allocate;
};

template <class Params>
void call_on_cuda(void (*run)(const Params&, void*, void*), const Params& params,
                  const Stream& stream) {
  const int64_t bytes = cuda::workspace_bytes(params);
  py::object workspace;
  void* memory = nullptr;
  if (bytes > 0) {
    workspace = stream.allocate(bytes);
    memory = reinterpret_cast<void*>(workspace.attr("data_ptr")().cast<uintptr_t>());
  }
  const py::gil_scoped_release release;
  cuda::set_device(stream.device);
  run(params, memory, reinterpret_cast<void*>(stream.handle));
}

// `where`: the number of threads, or a Stream. `elements`: of all tensors together.
template <class Params>
void call(void (*on_cpu)(const Params&, void*, int), void (*on_cuda)(const Params&, void*, void*),
          const Params& params, const py::handle& where, int64_t elements) {
  if (PyLong_Check(where.ptr())) {
    call_on_cpu(on_cpu, params, where.cast<int>(), elements);
  } else {
    call_on_cuda<Params>(on_cuda, params, where.cast<const Stream&>());
  }
}

// The same without a workspace.
template <class Params>
void call(void (*on_cpu)(const Params&), void (*on_cuda)(const Params&, void*),
          const Params& params, const py::handle& where, int64_t) {
  const Stream* const stream = PyLong_Check(where.ptr()) ? nullptr : &where.cast<const Stream&>();
  const py::gil_scoped_release release;
  if (!stream) return on_cpu(params);
  cuda::set_device(stream->device);
  on_cuda(params, reinterpret_cast<void*>(stream->handle));
}

}  // namespace latte::python
