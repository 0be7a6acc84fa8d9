// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "model.h"
#include "ops.h"
#include "safetensors.h"

namespace engine {

/// One sequence: what a model remembers of the tokens so far, a fixed size.
class Session {
 public:
  /// A sequence without tokens. `model` must outlive it. @throws Error unless threads >= 1.
  Session(const Model& model, int threads);

  /// Reads more tokens; logits (V,) of the next one. @throws Error for no tokens, or one that is
  /// not in [0, V): nothing is read then.
  const std::vector<float>& read(const std::vector<int64_t>& tokens);

  /// The logits after the last token; empty before the first.
  const std::vector<float>& logits() const { return logits_; }
  int64_t position() const { return position_; }

  /// The sequence as the contents of a file, and back: it goes on with the same bits.
  /// @throws Error, and changes nothing, if the file is damaged or belongs to another model.
  SafeTensors save() const;
  void resume(SafeTensors file);

 private:
  void read_some(const int64_t* tokens, int64_t count, bool last);

  const Model& model_;
  Caller call_;
  std::vector<BlockState> states_;
  std::vector<float> logits_;
  int64_t position_ = 0;
};

}  // namespace engine
