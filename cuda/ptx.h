// SPDX-License-Identifier: Apache-2.0
// Every instruction that CUDA C++ cannot name: all inline PTX of the library, each beside what the
// emulation does instead. With g = lane / 4 and t = lane % 4 throughout.
#pragma once

#include "cuda/device.h"

namespace latte::cuda {

// ---- tensor cores: d += a b, float32 accumulators d of rows g, g + 8 and columns 2 t, 2 t + 1
// ----

// a (16,16) row-major, b (16,8) column-major, both T: __nv_bfloat16 or __half. Registers of a: rows
// g, g + 8, then the same rows eight columns further; of b: rows 2 t, 2 t + 1, then eight further.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1,
                                             [[maybe_unused]] CallSite site = CallSite::current()) {
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBfloat16 || std::is_same_v<T, __half>);
#ifdef __CUDACC__
  if constexpr (kBfloat16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  constexpr auto kKind =
      kBfloat16 ? emulation::Mma::bfloat16_m16n8k16 : emulation::Mma::float16_m16n8k16;
  emulation::mma(kKind, d, a, b0, b1, site);
#endif
}

// a (16,8), b (8,8) as float32 bits of which the device reads the upper 19: convert with to_tf32().
// Registers of a: rows g, g + 8 of column t, then of column t + 4; of b: rows t, t + 4.
__device__ __forceinline__ void mma_m16n8k8_tf32(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
    [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  emulation::mma(emulation::Mma::tf32_m16n8k8, d, a, b0, b1, site);
#endif
}

// To 10 bits of mantissa, nearest with ties away from zero. What is lost is x - to_tf32(x): three
// products of such halves give float32 accuracy.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t result;
  // Volatile: a loop would keep the converted halves of all operands that it does not change, which
  // are twice as many registers as the operands.
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
#else
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fffffff : (bits + 0x1000) & ~0x1fffu;
#endif
}

// Two numbers in one register, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBfloat16 || std::is_same_v<T, __half>);
#ifdef __CUDACC__
  uint32_t result;
  if constexpr (kBfloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  if constexpr (kBfloat16)
    return __float2bfloat16_rn(low).code | uint32_t{__float2bfloat16_rn(high).code} << 16;
  else
    return __float2half_rn(low).code | uint32_t{__float2half_rn(high).code} << 16;
#endif
}

// ---- shared memory ----

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#else
namespace detail {

template <int kCount>
void emulated_ldmatrix(uint32_t (&result)[kCount], bool transposed, const void* row,
                       CallSite site) {
  uint4 data{};
  if (emulation::ldmatrix_reads(kCount)) {
    emulation::check_ldmatrix_row(row, site);
    data = *static_cast<const uint4*>(row);
  }
  emulation::ldmatrix(result, kCount, transposed, row, data, site);
}

}  // namespace detail
#endif

// Loads 8x8 matrices of 16-bit elements. Lane 8 m + r passes the address of row r of matrix m: 16
// bytes, 16-byte aligned; register m receives elements 2 t, 2 t + 1 of row g, or of column g of the
// transposed forms. x2 ignores the addresses of lanes 16 to 31.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&result)[4], const void* row,
                                            [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row))
               : "memory");
#else
  detail::emulated_ldmatrix(result, false, row, site);
#endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(
    uint32_t (&result)[4], const void* row, [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row))
               : "memory");
#else
  detail::emulated_ldmatrix(result, true, row, site);
#endif
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&result)[2], const void* row,
                                            [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(result[0]), "=r"(result[1])
               : "r"(shared_address(row))
               : "memory");
#else
  detail::emulated_ldmatrix(result, false, row, site);
#endif
}

__device__ __forceinline__ void ldmatrix_x2_trans(
    uint32_t (&result)[2], const void* row, [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(result[0]), "=r"(result[1])
               : "r"(shared_address(row))
               : "memory");
#else
  detail::emulated_ldmatrix(result, true, row, site);
#endif
}

// ---- asynchronous copies from global to shared memory ----

// Copies 16 bytes, both sides 16-byte aligned; zeros if not `valid`, and then `source` is not read.
// The target is undefined until the thread has waited for the copy's group, and other threads see
// it after a barrier that follows the wait.
__device__ __forceinline__ void async_copy_16(
    void* target, const void* source, bool valid,
    [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
#else
  const emulation::AsyncCopy copy{static_cast<uint4*>(target), static_cast<const uint4*>(source),
                                  valid};
  emulation::async_issue(copy, site);
  *copy.target = uint4{~0u, ~0u, ~0u, ~0u};  // poison, and the write that TSan must see
#endif
}

// Closes the group of all copies since the last commit; it may be empty.
__device__ __forceinline__ void async_copy_commit(
    [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::async_commit(site);
#endif
}

// Waits for all of this thread's groups except the `kAllowed` latest.
template <int kAllowed>
__device__ __forceinline__ void async_copy_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kAllowed) : "memory");
#else
  emulation::AsyncCopy copy;
  while (emulation::async_next(kAllowed, copy)) *copy.target = copy.valid ? *copy.source : uint4{};
#endif
}

// ---- barriers of some of a block's warps ----

// Barrier `id` from 1 to 15 of `threads` threads, a multiple of 32: waits for all of them.
__device__ __forceinline__ void named_barrier_sync(
    int id, int threads, [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulation::named_barrier(id, threads, true, site);
#endif
}

// Counts the calling thread without waiting: the side of a producer.
__device__ __forceinline__ void named_barrier_arrive(
    int id, int threads, [[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emulation::named_barrier(id, threads, false, site);
#endif
}

// ---- the rest ----

// 2^x with a relative error of 2^-22; exactly 0 for -inf.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// In the body of every loop that waits for another thread's write.
__device__ __forceinline__ void spin_pause([[maybe_unused]] CallSite site = CallSite::current()) {
#ifdef __CUDACC__
  __nanosleep(32);
#else
  emulation::spin_pause(site);
#endif
}

}  // namespace latte::cuda
