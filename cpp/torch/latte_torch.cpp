// SPDX-License-Identifier: Apache-2.0
// Operators of torch.ops.latte_ext for programs without Python, through torch's stable C interface:
// a package of AOTInductor finds them after dlopen(). Schemas as in python/latte_ext/_ops.py, which
// registers nothing of what is here already: an operator has one definer.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "latte/latte.h"

namespace {

using torch::headeronly::ScalarType;
using Tensor = torch::stable::Tensor;
using Optional = std::optional<Tensor>;

latte::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return latte::DType::float32;
    case ScalarType::Double:
      return latte::DType::float64;
    case ScalarType::BFloat16:
      return latte::DType::bfloat16;
    case ScalarType::Half:
      return latte::DType::float16;
    case ScalarType::Bool:
      return latte::DType::boolean;
    case ScalarType::Int:
      return latte::DType::int32;
    case ScalarType::Long:
      return latte::DType::int64;
    default:
      throw std::runtime_error(
          "[latte_ext] got a tensor of an unsupported dtype, expected float32, "
          "float64, bfloat16, float16, bool, int32 or int64");
  }
}

latte::Tensor view(const Tensor& x) {
  latte::Tensor t;
  t.data = x.data_ptr();
  t.dtype = dtype_of(x);
  t.rank = x.dim();
  // The core refuses a higher rank by name.
  for (int64_t i = 0; i < t.rank && i < 4; ++i) {
    t.shape[i] = x.size(i);
    t.stride[i] = x.stride(i);
  }
  return t;
}

latte::Tensor view(const Optional& x) { return x ? view(*x) : latte::Tensor{}; }

// Outputs are sized from these shapes before the core sees the call.
void check_rank(const char* op, const char* name, const Tensor& x, int64_t rank) {
  if (x.dim() != rank)
    throw std::runtime_error(std::string("[") + op + "] " + name + " has " +
                             std::to_string(x.dim()) + " dimensions, expected " +
                             std::to_string(rank));
}

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

template <class Params>
void call(void (*run)(const Params&, void*, int), const Params& params) {
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  const auto bytes = static_cast<size_t>(latte::workspace_bytes(params, threads));
  const std::unique_ptr<char, AlignedDelete> workspace(
      static_cast<char*>(::operator new[](bytes, std::align_val_t{64})));
  run(params, workspace.get(), threads);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> latent_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Optional& key_mask,
    const Optional& cu_seqlens, const Optional& max, const Optional& norm, const Optional& mean,
    bool causal, double scale) {
  check_rank("latent_attention", "q", q, 4);
  check_rank("latent_attention", "k", k, 4);
  check_rank("latent_attention", "v", v, 4);
  if (cu_seqlens) check_rank("latent_attention", "cu_seqlens", *cu_seqlens, 1);
  const ScalarType wide =
      v.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t sequences = cu_seqlens ? cu_seqlens->size(0) - 1 : q.size(0);
  const std::array<int64_t, 4> rows{q.size(0), q.size(1), q.size(2), v.size(3)};
  const std::array<int64_t, 4> means{sequences, k.size(1), q.size(3), v.size(3)};
  const std::array<int64_t, 3> logits{sequences, k.size(1), q.size(3)};
  Tensor y = torch::stable::new_empty(v, rows);
  Tensor final_max = torch::stable::new_empty(v, logits, wide);
  Tensor final_norm = torch::stable::new_empty(v, logits, wide);
  Tensor final_mean = torch::stable::new_empty(v, means, wide);
  latte::LatentAttentionForward p;
  p.q = view(q);
  p.k = view(k);
  p.v = view(v);
  p.key_mask = view(key_mask);
  p.cu_seqlens = view(cu_seqlens);
  p.initial = {view(max), view(norm), view(mean)};
  p.y = view(y);
  p.final = {view(final_max), view(final_norm), view(final_mean)};
  p.causal = causal;
  p.scale = scale;
  call(latte::latent_attention_forward, p);
  return {y, final_max, final_norm, final_mean};
}

Tensor latent_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& max,
                             const Tensor& norm, const Tensor& mean, double scale) {
  check_rank("latent_attention_step", "q", q, 3);
  check_rank("latent_attention_step", "v", v, 3);
  const std::array<int64_t, 3> rows{q.size(0), q.size(1), v.size(2)};
  Tensor y = torch::stable::new_empty(v, rows);
  latte::LatentAttentionStep p;
  p.q = view(q);
  p.k = view(k);
  p.v = view(v);
  p.state = {view(max), view(norm), view(mean)};
  p.y = view(y);
  p.scale = scale;
  call(latte::latent_attention_step, p);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(latte_ext, m) {
  m.def(
      "latent_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, "
      "Tensor? max, Tensor? norm, Tensor? mean, bool causal, float scale)"
      " -> (Tensor y, Tensor max, Tensor norm, Tensor mean)");
  m.def(
      "latent_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) max, Tensor(b!) norm, "
      "Tensor(c!) mean, float scale) -> Tensor y");
}

STABLE_TORCH_LIBRARY_IMPL(latte_ext, CPU, m) {
  m.impl("latent_attention", TORCH_BOX(&latent_attention));
  m.impl("latent_attention_step", TORCH_BOX(&latent_attention_step));
}
