// SPDX-License-Identifier: Apache-2.0
// Which instruction set runs: the best one of this machine, or the one that LATTE_CPU_ISA names.
#include <cstdlib>
#include <string>
#if defined(LATTE_X86_LEVELS)
#include <cpuid.h>
#endif

#include "cpu/kernels.h"

namespace latte {
namespace isa_baseline {
const cpu::KernelTable& table();
}
#if defined(LATTE_X86_LEVELS)
namespace isa_v3 {
const cpu::KernelTable& table();
}
namespace isa_v4 {
const cpu::KernelTable& table();
}
#endif

namespace cpu {
namespace {

#if defined(LATTE_X86_LEVELS)
// Clang's __builtin_cpu_supports does not know "f16c".
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

struct Candidate {
  const KernelTable* table;
  bool supported;
};

const KernelTable& choose() {
  // Best first.
  const Candidate candidates[] = {
#if defined(LATTE_X86_LEVELS)
      {&isa_v4::table(), __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")},
      {&isa_v3::table(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                             __builtin_cpu_supports("bmi2") && has_f16c()},
#endif
      {&isa_baseline::table(), true},
  };
  const char* wanted = std::getenv("LATTE_CPU_ISA");
  std::string names;
  for (const Candidate& c : candidates) {
    if (!c.supported) continue;
    if (!wanted || !*wanted || std::string(wanted) == c.table->isa) return *c.table;
    names += (names.empty() ? "" : ", ") + std::string(c.table->isa);
  }
  throw Error(Error::Kind::value, "[latte_ext] LATTE_CPU_ISA is '" + std::string(wanted) +
                                      "', expected one of: " + names);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace cpu

const char* cpu_isa() { return cpu::kernels().isa; }

}  // namespace latte
