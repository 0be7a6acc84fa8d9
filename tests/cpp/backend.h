// SPDX-License-Identifier: Apache-2.0
// The functions under test: the CPU's, or with LATTE_TEST_CUDA those of latte/cuda.h, whose device
// is the host where they are emulated.
#pragma once

#include "latte/latte.h"
#ifdef LATTE_TEST_CUDA
#include "latte/cuda.h"
#endif

// Names that latte has not: its own would be found by their arguments.
namespace testing_latte {

#ifdef LATTE_TEST_CUDA

namespace backend = latte::cuda;
constexpr bool kTestsCuda = true;

template <class Params>
using Function = void (*)(const Params&, void* workspace, void* stream);

template <class Params>
int64_t workspace_size(const Params& params, int /*threads*/) {
  return latte::cuda::workspace_bytes(params);
}
template <class Params>
void call(Function<Params> function, const Params& params, void* workspace, int /*threads*/) {
  function(params, workspace, nullptr);
}
inline void merge_states(const latte::StateMerge& params) {
  latte::cuda::state_merge(params, nullptr);
}

#else

namespace backend = latte;
constexpr bool kTestsCuda = false;

template <class Params>
using Function = void (*)(const Params&, void* workspace, int threads);

template <class Params>
int64_t workspace_size(const Params& params, int threads) {
  return latte::workspace_bytes(params, threads);
}
template <class Params>
void call(Function<Params> function, const Params& params, void* workspace, int threads) {
  function(params, workspace, threads);
}
inline void merge_states(const latte::StateMerge& params) { latte::state_merge(params); }

#endif

}  // namespace testing_latte
