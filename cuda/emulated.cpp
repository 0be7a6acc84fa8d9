// SPDX-License-Identifier: Apache-2.0
// The counterpart of devices.cpp in a build for tests, whose one device is the emulation: memory of
// the host stands for that of a device.
#include "latte/cuda.h"

namespace latte {

bool cuda_built() { return true; }

}  // namespace latte

namespace latte::cuda {

Info info() {
  Info found;
  found.architectures = "emulated";
  found.emulated = true;
  found.devices = {"emulation on the CPU, for tests"};
  return found;
}

void set_device(int /*device*/) {}

}  // namespace latte::cuda
