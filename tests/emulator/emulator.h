// CUDA's words for kernels, on a CPU: every thread of a block is a fiber, and where a warp or a
// block meets, fibers wait for each other. Included before every file of csrc/cuda.
//
// What it does not have: the device's order of float16 products, races within a launch, timing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_types.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static  // one block runs at a time

using std::max;
using std::min;
using std::signbit;

inline uint3 threadIdx, blockIdx;

namespace emulator {

using Words = std::array<uint32_t, 6>;  // of a lane, exchanged at once
using WarpWords = std::array<Words, 32>;

// Give this lane's words to its warp, and get those of all lanes; valid until the next call.
const WarpWords& exchange(const Words& words);
// Wait for all threads of the block.
void synchronize();
// Dynamic shared memory of the block; poisoned before it runs.
uint8_t* shared_memory();
// Run a kernel, one block after the other: like all launches as late as may be, which is before the
// next one or finish(). One that overlaps runs at once, and the one before it when all threads of a
// block that are not done wait in await_previous().
void launch(dim3 grid, int threads, std::function<void()> kernel, bool overlaps);
void await_previous();
void finish();

inline int lane() { return threadIdx.x & 31; }

// Numbers of all lanes, of which each gives one.
template <typename T>
class Lanes {
 public:
  explicit Lanes(T own) : words_(exchange(as_words(own))) {}

  T operator[](int lane) const {
    T x;
    std::memcpy(&x, &words_[lane], sizeof x);
    return x;
  }

 private:
  static Words as_words(T x) {
    Words words{};
    static_assert(sizeof x <= sizeof words);
    std::memcpy(&words, &x, sizeof x);
    return words;
  }

  const WarpWords& words_;
};

template <typename To, typename From>
To bits_of(From x) {
  To to;
  static_assert(sizeof to == sizeof x);
  std::memcpy(&to, &x, sizeof x);
  return to;
}

}  // namespace emulator

inline void __syncthreads() { emulator::synchronize(); }
inline void __syncwarp() { emulator::Lanes<int>(0); }

template <typename T>
T __shfl_sync(unsigned, T x, int source) {
  return emulator::Lanes<T>(x)[source & 31];
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulator::Lanes<T>(x)[emulator::lane() ^ mask];
}
template <typename T>
T __shfl_down_sync(unsigned, T x, int step) {
  const int source = emulator::lane() + step;
  return emulator::Lanes<T>(x)[source < 32 ? source : emulator::lane()];
}
template <typename T>
T __reduce_max_sync(unsigned, T x) {
  const emulator::Lanes<T> lanes(x);
  for (int i = 0; i < 32; ++i) x = max(x, lanes[i]);
  return x;
}
template <typename T>
T __reduce_min_sync(unsigned, T x) {
  const emulator::Lanes<T> lanes(x);
  for (int i = 0; i < 32; ++i) x = min(x, lanes[i]);
  return x;
}
inline unsigned __ballot_sync(unsigned, bool flag) {
  const emulator::Lanes<unsigned> lanes(flag);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= lanes[i] << i;
  return bits;
}
inline bool __any_sync(unsigned mask, bool flag) { return __ballot_sync(mask, flag) != 0; }

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline int __float2int_rn(float x) {
  if (std::isnan(x)) return 0;
  return static_cast<int>(std::nearbyint(min(max(x, -2147483648.0f), 2147483520.0f)));
}
#define __expf(x) std::exp(static_cast<float>(x))
inline float __int_as_float(int x) { return emulator::bits_of<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits_of<float>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits_of<unsigned>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t{a} * b) >> 32; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
inline int atomicAdd(int* at, int x) { return std::exchange(*at, *at + x); }
inline int atomicMax(int* at, int x) { return std::exchange(*at, max(*at, x)); }
