// SPDX-License-Identifier: Apache-2.0
// A model with latent attention, exported from Python and compiled by AOTInductor, in a process
// without Python: run_package <_torch.so> <model.pt2>. It attends from all ones and prints the sum.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: run_package <_torch.so> <model.pt2>\n");
    return 2;
  }
  // Its operators are registered from here on.
  if (!dlopen(argv[1], RTLD_NOW)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const std::vector<torch::Tensor> inputs{
      torch::linspace(-1, 1, 2 * 2 * 9 * 4).reshape({2, 2, 9, 4})};
  for (const torch::Tensor& y : model.run(inputs)) std::printf("%.9g\n", y.sum().item<double>());
  return 0;
}
