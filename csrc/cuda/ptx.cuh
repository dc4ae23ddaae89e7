// Instructions without a C++ spelling, each wrapped and named.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace tq::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Copy 16 bytes to shared memory, past the L1 cache; complete after cp_async_wait and a barrier.
__device__ inline void cp_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most kPending of this thread's newest groups are incomplete.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Let a kernel launched with `overlaps` begin, once every CTA of this one has called this or ended.
__device__ inline void begin_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Wait until the kernel that this one overlaps has ended, and see what it wrote.
__device__ inline void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// threadIdx.x, read anew: what follows from it is not kept in registers from one use to the next.
__device__ inline int read_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Look four bytes of a register up. Selectors have no bit but the lowest two of a nibble set.
// NOTE: not __byte_perm, which masks the selector first.
__device__ inline uint32_t prmt(uint32_t table, uint32_t selectors) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(bytes) : "r"(table), "r"(selectors));
  return bytes;
}

// NOTE: not x >> 16, which the compiler swaps with a mask before it.
__device__ inline uint32_t shift_right_16(uint32_t x) {
  uint32_t half;
  asm("shr.u32 %0, %1, 16;" : "=r"(half) : "r"(x));
  return half;
}

// c[16 x 8] += a[16 x 32] b[32 x 8], int8 in, int32 out.
//
// Lane 4 g + t holds, four consecutive k to a register: a = {row g, k 4t; row g + 8, k 4t; row g, k
// 16 + 4t; row g + 8, k 16 + 4t}, b = {k 4t, column g; k 16 + 4t, column g}, c = {row g, columns 2t
// and 2t + 1; row g + 8, the same}.
__device__ inline void mma_int8(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c[16 x 8] += a[16 x 16] b[16 x 8], float16 in, float32 out; lanes as in mma_int8, two k to a
// register.
__device__ inline void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline uint32_t pack_half2(float low, float high) {
  const __half2 packed = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

// Add to a counter and return what it was. What was written before, by threads that a barrier had
// joined with this one too, is seen after any later addition, by those that a barrier joins with
// it.
__device__ inline uint32_t add_acq_rel(uint32_t* counter, uint32_t count) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(count)
               : "memory");
  return before;
}

// Load what other CTAs may have written during this launch, or this one to shared memory.
__device__ inline float load_relaxed(const float* at) {
  float x;
  asm volatile("ld.relaxed.gpu.f32 %0, [%1];" : "=f"(x) : "l"(at) : "memory");
  return x;
}

// The same for neighbours, aligned to all of them.
__device__ inline void load_relaxed(const float* at, float (&x)[2]) {
  asm volatile("ld.relaxed.gpu.v2.f32 {%0, %1}, [%2];"
               : "=f"(x[0]), "=f"(x[1])
               : "l"(at)
               : "memory");
}
__device__ inline void load_relaxed(const float* at, float (&x)[4]) {
  asm volatile("ld.relaxed.gpu.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "l"(at)
               : "memory");
}

}  // namespace tq::cuda
