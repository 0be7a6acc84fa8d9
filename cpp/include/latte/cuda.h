// SPDX-License-Identifier: Apache-2.0
/// @file
/// The operators of latte.h on an NVIDIA GPU: the same structures, every tensor, state and
/// workspace in memory of the current device.
///
/// A call checks shapes, strides and types, and only enqueues work on `stream`, a cudaStream_t
/// (null: the default stream): it never allocates and never synchronises, so that CUDA graphs can
/// capture it. Values on the device (cu_seqlens, masks, positions) are not checked; where ranges
/// are out of order or beyond the tokens, nothing outside of the tensors is read or written, but
/// the results are unspecified.
///
/// Errors: latte::Error, as in latte.h; of kind runtime, with CUDA's message, where a kernel cannot
/// be launched.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "latte/export.h"
#include "latte/latte.h"

namespace latte::cuda {

/// This build and this machine.
struct Info {
  std::string architectures;         ///< that the kernels are compiled for, as CMake names them
  bool emulated = false;             ///< a build for tests: the host's memory stands for a device's
  int runtime = 0;                   ///< versions, 1000 major + 10 minor
  int driver = 0;                    ///< 0: none is installed
  std::vector<std::string> devices;  ///< their names
  std::string error;                 ///< why there is no device
};
/// Never throws: without a driver or a device it says so in `error`.
LATTE_EXPORT Info info();

/// Makes `device` the current one of the calling thread.
LATTE_EXPORT void set_device(int device);

/// What launch planning cannot derive from shapes: how long sequences are cut where there are few.
struct Tuning {
  int64_t wanted_blocks;       ///< that keep a device busy
  int64_t min_segment_tokens;  ///< that are worth a block of their own
};
/// What is in use.
LATTE_EXPORT Tuning tuning();
/// For measurements: of all calls from now on, whose results then have other bits. Not between
/// workspace_bytes() and its call. Throws unless both are positive.
LATTE_EXPORT void set_tuning(const Tuning& tuning);

/// Workspace that the same call needs, in bytes (alignment is arranged inside). It depends on
/// shapes, strides and types alone, not on the device. 0: `workspace` may be null.
/// @{
LATTE_EXPORT int64_t workspace_bytes(const LatentAttentionForward& params);
LATTE_EXPORT int64_t workspace_bytes(const LatentAttentionBackward& params);
LATTE_EXPORT int64_t workspace_bytes(const LatentAttentionStep& params);
LATTE_EXPORT int64_t workspace_bytes(const LinearRecurrenceForward& params);
LATTE_EXPORT int64_t workspace_bytes(const LinearRecurrenceBackward& params);
LATTE_EXPORT int64_t workspace_bytes(const RgLruForward& params);
LATTE_EXPORT int64_t workspace_bytes(const RgLruBackward& params);
LATTE_EXPORT int64_t workspace_bytes(const ShortConvForward& params);
LATTE_EXPORT int64_t workspace_bytes(const ShortConvBackward& params);
LATTE_EXPORT int64_t workspace_bytes(const SlidingWindowForward& params);
LATTE_EXPORT int64_t workspace_bytes(const SlidingWindowBackward& params);
LATTE_EXPORT int64_t workspace_bytes(const SlidingWindowStep& params);
LATTE_EXPORT int64_t workspace_bytes(const MacchiatoForward& params);
LATTE_EXPORT int64_t workspace_bytes(const MacchiatoBackward& params);
LATTE_EXPORT int64_t workspace_bytes(const MacchiatoStep& params);
LATTE_EXPORT int64_t workspace_bytes(const Rotate& params);
/// @}

/// Enqueues what its structure describes.
/// @{
LATTE_EXPORT void latent_attention_forward(const LatentAttentionForward& params, void* workspace,
                                           void* stream);
LATTE_EXPORT void latent_attention_backward(const LatentAttentionBackward& params, void* workspace,
                                            void* stream);
LATTE_EXPORT void latent_attention_step(const LatentAttentionStep& params, void* workspace,
                                        void* stream);
LATTE_EXPORT void linear_recurrence_forward(const LinearRecurrenceForward& params, void* workspace,
                                            void* stream);
LATTE_EXPORT void linear_recurrence_backward(const LinearRecurrenceBackward& params,
                                             void* workspace, void* stream);
LATTE_EXPORT void rg_lru_forward(const RgLruForward& params, void* workspace, void* stream);
LATTE_EXPORT void rg_lru_backward(const RgLruBackward& params, void* workspace, void* stream);
LATTE_EXPORT void short_conv_forward(const ShortConvForward& params, void* workspace, void* stream);
LATTE_EXPORT void short_conv_backward(const ShortConvBackward& params, void* workspace,
                                      void* stream);
LATTE_EXPORT void state_merge(const StateMerge& params, void* stream);
LATTE_EXPORT void sliding_window_forward(const SlidingWindowForward& params, void* workspace,
                                         void* stream);
LATTE_EXPORT void sliding_window_backward(const SlidingWindowBackward& params, void* workspace,
                                          void* stream);
LATTE_EXPORT void sliding_window_step(const SlidingWindowStep& params, void* workspace,
                                      void* stream);
LATTE_EXPORT void macchiato_forward(const MacchiatoForward& params, void* workspace, void* stream);
LATTE_EXPORT void macchiato_backward(const MacchiatoBackward& params, void* workspace,
                                     void* stream);
LATTE_EXPORT void macchiato_step(const MacchiatoStep& params, void* workspace, void* stream);
LATTE_EXPORT void rotate(const Rotate& params, void* workspace, void* stream);
/// @}

}  // namespace latte::cuda
