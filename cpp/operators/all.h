// SPDX-License-Identifier: Apache-2.0
// Every operator, in a list to register from.
#pragma once

#include "latent_attention.h"
#include "mixers.h"
#include "rotate.h"
#include "window.h"

namespace latte::operators {

// f.template operator()<Operator>() for each.
template <class F>
void for_each(const F& f) {
  const auto apply = [&]<class... Operator>() { (f.template operator()<Operator>(), ...); };
  apply.template
  operator()<LatentAttention, LatentAttentionGradient, LatentAttentionOneStep, MergeStates,
             LinearRecurrence, LinearRecurrenceGradient, GatedRecurrence, GatedRecurrenceGradient,
             GatedRecurrenceStep, ShortConvolution, ShortConvolutionGradient, ShortConvolutionStep,
             SlidingWindowAttention, SlidingWindowAttentionGradient, SlidingWindowAttentionStep,
             MacchiatoAttention, MacchiatoAttentionGradient, MacchiatoAttentionStep, Rotation>();
}

// Which arguments an operator updates in place: their types in the schema end in "!)".
template <class Operator>
std::vector<int> written() {
  std::vector<int> found;
  int argument = 0;
  for (const char* c = Operator::schema; *c != '\0' && *c != '>'; ++c) {
    if (*c == ',') ++argument;
    if (*c == '!') found.push_back(argument);
  }
  return found;
}

template <class Operator>
std::string name_of() {
  const std::string schema = Operator::schema;
  return schema.substr(0, schema.find('('));
}

}  // namespace latte::operators
