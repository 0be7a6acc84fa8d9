// SPDX-License-Identifier: Apache-2.0
// What the drivers share: the caller's tensors and workspace, and grids of any size.
#pragma once

#include <string>

#include "common/element_size.h"
#include "common/validate.h"
#include "cuda/device.h"
#include "cuda/heuristics.h"
#include "latte/latte.h"

namespace latte::cuda {

// Parts of a workspace, aligned as cudaMalloc does. Without memory it counts bytes.
class Workspace {
 public:
  explicit Workspace(void* memory = nullptr) : base_(reinterpret_cast<uintptr_t>(memory)) {
    base_ += (kAlignment - base_ % kAlignment) % kAlignment;
  }
  template <class T>
  T* take(int64_t count) {
    const uintptr_t part = base_ + static_cast<uintptr_t>(used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return reinterpret_cast<T*>(part);
  }
  // Of all parts, wherever the memory starts.
  int64_t bytes() const { return used_ == 0 ? 0 : used_ + kAlignment; }
  void require(const char* op) const {
    if (used_ > 0 && base_ == 0)
      throw Error(Error::Kind::value,
                  std::string("[") + op + "] workspace is null, expected workspace_bytes() bytes");
  }

 private:
  static constexpr int64_t kAlignment = 256;
  uintptr_t base_;
  int64_t used_ = 0;
};

// A plan has place(Workspace&), which takes what it needs, and run(stream).
template <class Plan>
int64_t workspace_of(Plan plan) {
  Workspace workspace;
  plan.place(workspace);
  return workspace.bytes();
}
template <class Plan>
void run_plan(const char* op, Plan plan, void* memory, void* stream) {
  Workspace workspace(memory);
  plan.place(workspace);
  workspace.require(op);
  plan.run(stream);
}

// launch() of that many blocks in one dimension; of none, nothing.
template <class Kernel, class... Args>
void launch_blocks(const char* op, Kernel kernel, int64_t blocks, dim3 threads,
                   int64_t shared_bytes, void* stream, const Args&... args) {
  if (blocks > INT32_MAX)
    throw Error(Error::Kind::value, std::string("[") + op + "] needs " + std::to_string(blocks) +
                                        " thread blocks, expected at most 2147483647");
  launch(kernel, dim3(static_cast<unsigned>(blocks)), threads, static_cast<size_t>(shared_bytes),
         stream, args...);
}

// True if whole vectors of `bytes` can be moved: the first element and every row are aligned.
inline bool aligned(const Tensor& t, int64_t bytes) {
  const int64_t size = element_size(t.dtype);
  bool all = t.stride[t.rank - 1] == 1 && reinterpret_cast<uintptr_t>(t.data) % bytes == 0;
  for (int64_t i = 0; i + 1 < t.rank; ++i) all &= t.stride[i] * size % bytes == 0;
  return all;
}

}  // namespace latte::cuda
