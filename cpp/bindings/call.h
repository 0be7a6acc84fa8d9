// SPDX-License-Identifier: Apache-2.0
// Workspace for one call of the core, and the call without the interpreter's lock.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <new>

#include "latte/latte.h"

namespace latte::python {

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

template <class Params>
void call(void (*run)(const Params&, void*, int), const Params& params, int threads) {
  // Enough for one token, whose kernel takes little longer than an allocation.
  alignas(64) char small[8192];
  const auto bytes = static_cast<size_t>(workspace_bytes(params, threads));
  std::unique_ptr<char, AlignedDelete> large;
  if (bytes > sizeof small)
    large.reset(static_cast<char*>(::operator new[](bytes, std::align_val_t{64})));
  const pybind11::gil_scoped_release release;
  run(params, large ? large.get() : small, threads);
}

// Of window.cpp.
void define_window(pybind11::module_& m);

}  // namespace latte::python
