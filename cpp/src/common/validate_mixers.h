// SPDX-License-Identifier: Apache-2.0
// The border of recurrences and convolutions.
#pragma once

#include "common/validate.h"
#include "latte/latte.h"

namespace latte {

struct MixerProblem {
  int64_t batch = 0, tokens = 0, channels = 0;
  int64_t sequences = 0;  // batch, or the number of packed sequences
  int64_t width = 1;      // of a convolution
  bool packed = false;
  bool is_double = false;
};

MixerProblem validate(const LinearRecurrenceForward& params, Memory memory = Memory::host);
MixerProblem validate(const LinearRecurrenceBackward& params, Memory memory = Memory::host);
MixerProblem validate(const RgLruForward& params, Memory memory = Memory::host);
MixerProblem validate(const RgLruBackward& params, Memory memory = Memory::host);
MixerProblem validate(const ShortConvForward& params, Memory memory = Memory::host);
MixerProblem validate(const ShortConvBackward& params, Memory memory = Memory::host);

}  // namespace latte
