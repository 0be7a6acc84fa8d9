// SPDX-License-Identifier: Apache-2.0
// What this build and this machine have of CUDA. The counterpart in a build without: no_cuda.cpp.
#include <cuda_runtime_api.h>

#include <string>

#include "latte/cuda.h"

namespace latte {

bool cuda_built() { return true; }

}  // namespace latte

namespace latte::cuda {
namespace {

std::string name_of(int device) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return std::string(properties.name) + ", compute capability " + std::to_string(properties.major) +
         "." + std::to_string(properties.minor);
}

}  // namespace

Info info() {
  Info found;
  found.architectures = LATTE_CUDA_ARCHITECTURES;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess)
    found.error = std::string("cudaGetDeviceCount: ") + cudaGetErrorString(error);
  else if (count == 0)
    found.error = "cudaGetDeviceCount: 0 devices";
  // Both set 0 where they fail.
  static_cast<void>(cudaRuntimeGetVersion(&found.runtime));
  static_cast<void>(cudaDriverGetVersion(&found.driver));
  for (int device = 0; device < count; ++device) found.devices.push_back(name_of(device));
  return found;
}

void set_device(int device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess)
    throw Error(Error::Kind::runtime,
                "[cuda] device " + std::to_string(device) + ": " + cudaGetErrorString(error));
}

}  // namespace latte::cuda
