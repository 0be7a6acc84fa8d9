// SPDX-License-Identifier: Apache-2.0
// A language model without Python: what export.py compiled reads a prompt and writes the tokens
// that greedy decoding adds to it.
//   run_package <_torch.so> <prefill.pt2> <step.pt2> <tokens to add> <token of the prompt>...
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr,
                 "usage: run_package <_torch.so> <prefill.pt2> <step.pt2> <count> <token>...\n");
    return 2;
  }
  // The operators of latte_ext are registered from here on.
  if (!dlopen(argv[1], RTLD_NOW)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader prefill(argv[2]), step(argv[3]);
  std::vector<int64_t> prompt;
  for (int i = 5; i < argc; ++i) prompt.push_back(std::atoll(argv[i]));

  // Logits (1,V), then the tensors of the cache.
  std::vector<torch::Tensor> state = prefill.run({torch::tensor(prompt).unsqueeze(0)});
  for (int left = std::atoi(argv[4]); left > 0; --left) {
    const torch::Tensor token = state[0].argmax(1);
    std::printf("%lld ", static_cast<long long>(token.item<int64_t>()));
    // In the place of the logits stands the token; the cache is updated in place.
    state[0] = token;
    state[0] = step.run(state)[0];
  }
  std::printf("\n");
  return 0;
}
