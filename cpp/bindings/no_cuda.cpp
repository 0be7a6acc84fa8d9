// SPDX-License-Identifier: Apache-2.0
// latte/cuda.h for a module that is built without it.
#include "latte/cuda.h"

namespace latte::cuda {
namespace {

constexpr const char* kUnbuilt = "built without CUDA";

[[noreturn]] void fail() { throw Error(Error::Kind::runtime, std::string("[cuda] ") + kUnbuilt); }

}  // namespace

int64_t workspace_bytes(const LatentAttentionForward&) { fail(); }
int64_t workspace_bytes(const LatentAttentionBackward&) { fail(); }
int64_t workspace_bytes(const LatentAttentionStep&) { fail(); }
int64_t workspace_bytes(const LinearRecurrenceForward&) { fail(); }
int64_t workspace_bytes(const LinearRecurrenceBackward&) { fail(); }
int64_t workspace_bytes(const RgLruForward&) { fail(); }
int64_t workspace_bytes(const RgLruBackward&) { fail(); }
int64_t workspace_bytes(const ShortConvForward&) { fail(); }
int64_t workspace_bytes(const ShortConvBackward&) { fail(); }
int64_t workspace_bytes(const SlidingWindowForward&) { fail(); }
int64_t workspace_bytes(const SlidingWindowBackward&) { fail(); }
int64_t workspace_bytes(const SlidingWindowStep&) { fail(); }
int64_t workspace_bytes(const MacchiatoForward&) { fail(); }
int64_t workspace_bytes(const MacchiatoBackward&) { fail(); }
int64_t workspace_bytes(const MacchiatoStep&) { fail(); }
int64_t workspace_bytes(const Rotate&) { fail(); }

void latent_attention_forward(const LatentAttentionForward&, void*, void*) { fail(); }
void latent_attention_backward(const LatentAttentionBackward&, void*, void*) { fail(); }
void latent_attention_step(const LatentAttentionStep&, void*, void*) { fail(); }
void linear_recurrence_forward(const LinearRecurrenceForward&, void*, void*) { fail(); }
void linear_recurrence_backward(const LinearRecurrenceBackward&, void*, void*) { fail(); }
void rg_lru_forward(const RgLruForward&, void*, void*) { fail(); }
void rg_lru_backward(const RgLruBackward&, void*, void*) { fail(); }
void short_conv_forward(const ShortConvForward&, void*, void*) { fail(); }
void short_conv_backward(const ShortConvBackward&, void*, void*) { fail(); }
void sliding_window_forward(const SlidingWindowForward&, void*, void*) { fail(); }
void sliding_window_backward(const SlidingWindowBackward&, void*, void*) { fail(); }
void sliding_window_step(const SlidingWindowStep&, void*, void*) { fail(); }
void macchiato_forward(const MacchiatoForward&, void*, void*) { fail(); }
void macchiato_backward(const MacchiatoBackward&, void*, void*) { fail(); }
void macchiato_step(const MacchiatoStep&, void*, void*) { fail(); }
void state_merge(const StateMerge&, void*) { fail(); }
void rotate(const Rotate&, void*, void*) { fail(); }

Info info() {
  Info none;
  none.error = kUnbuilt;
  return none;
}
void set_device(int) { fail(); }
Tuning tuning() { fail(); }
void set_tuning(const Tuning&) { fail(); }

}  // namespace latte::cuda
