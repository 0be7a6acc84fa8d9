// SPDX-License-Identifier: Apache-2.0
// Workspace of one call on the CPU.
#pragma once

#include <memory>
#include <new>

#include "latte/latte.h"

namespace latte::operators {

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

// run(workspace), after the validation of params.
template <class Params, class Run>
void with_workspace(const Params& params, int threads, const Run& run) {
  // Enough for one token, whose kernel takes little longer than an allocation.
  alignas(64) char small[8192];
  const auto bytes = static_cast<size_t>(workspace_bytes(params, threads));
  std::unique_ptr<char, AlignedDelete> large;
  if (bytes > sizeof small)
    large.reset(static_cast<char*>(::operator new[](bytes, std::align_val_t{64})));
  run(large ? large.get() : small);
}

}  // namespace latte::operators
