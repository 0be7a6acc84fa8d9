// SPDX-License-Identifier: Apache-2.0
// The one include of every kernel file: CUDA under nvcc, its emulation under a host compiler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "latte/latte.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda/emulation/cuda_emulation.h"
#endif

namespace latte::cuda {

#ifdef __CUDACC__

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

// The block's dynamic shared memory, 1024-byte aligned. The only shared memory that kernels use:
// static __shared__ arrays could be neither poisoned nor bounded by the emulation.
__device__ __forceinline__ unsigned char* shared_memory() { return dynamic_shared_memory; }

// Names the caller in reports of the emulation; nothing on a device.
struct CallSite {
  __host__ __device__ static constexpr CallSite current() { return {}; }
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw Error(Error::Kind::runtime,
                "[cuda] " + std::string(what) + ": " + cudaGetErrorString(error));
}

#else

inline unsigned char* shared_memory() { return emulation::shared_memory(); }

using CallSite = emulation::CallSite;

#endif

// What launch planning may depend on.
struct DeviceLimits {
  int shared_bytes;  // dynamic, per block
};

inline DeviceLimits device_limits() {
#ifdef __CUDACC__
  int device = 0;
  DeviceLimits limits{};
  check(cudaGetDevice(&device), "no current device");
  check(
      cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      "shared memory per block");
  return limits;
#else
  return {emulation::options().shared_bytes};
#endif
}

// Enqueues kernel(args...). A grid without blocks is an empty tensor: nothing to do.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef __CUDACC__
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "shared memory of a kernel");
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  check(cudaGetLastError(), "launch of a kernel");
#else
  static_cast<void>(stream);
  emulation::run_grid(grid, block, shared_bytes,
                      [=] { kernel(static_cast<Parameters>(arguments)...); });
#endif
}

// Accesses that count towards the byte budget that the tests check.
template <class T>
__device__ __forceinline__ T global_load(const T* address) {
#ifndef __CUDACC__
  emulation::count_load(sizeof(T));
#endif
  return *address;
}

template <class T>
__device__ __forceinline__ void global_store(T* address, const T& value) {
#ifndef __CUDACC__
  emulation::count_store(sizeof(T));
#endif
  *address = value;
}

}  // namespace latte::cuda
