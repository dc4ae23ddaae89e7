// One group of coordinates held by a warp: lane i has coordinates i * kPerLane to (i + 1) *
// kPerLane - 1.
//
// Additions are in the order of reference.py (hadamard, tree_sum), so that float32 results are
// equal bit for bit; every rounding step is written as an intrinsic that the compiler does not
// fuse.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/params.h"
#include "core/rotation.h"
#include "cuda/ptx.cuh"

namespace tq::cuda {

template <int kGroup>
inline constexpr int kPerLane = kGroup / 32;

// Multiply by the unnormalized Hadamard matrix, largest stride first.
template <int kGroup>
__device__ inline void warp_hadamard(float (&x)[kPerLane<kGroup>]) {
  constexpr int kCount = kPerLane<kGroup>;
  const int lane = read_thread() & 31;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const float other = __shfl_xor_sync(kAllLanes, x[e], mask);
      x[e] = upper ? __fsub_rn(other, x[e]) : __fadd_rn(x[e], other);
    }
  }
#pragma unroll
  for (int stride = kCount / 2; stride > 0; stride /= 2) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (e & stride) continue;
      const float a = x[e], b = x[e + stride];
      x[e] = __fadd_rn(a, b);
      x[e + stride] = __fsub_rn(a, b);
    }
  }
}

// Sum by halving; every lane gets the sum.
template <int kGroup>
__device__ inline float warp_tree_sum(float (&x)[kPerLane<kGroup>]) {
  constexpr int kCount = kPerLane<kGroup>;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      x[e] = __fadd_rn(x[e], __shfl_xor_sync(kAllLanes, x[e], mask));
    }
  }
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
    for (int e = 0; e < half; ++e) x[e] = __fadd_rn(x[e], x[e + half]);
  }
  return x[0];
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, mask));
  return x;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// Sums of kCount numbers, a power of two up to 32, of every lane; lane i gets that of number
// i / (32 / kCount). kMask: of lanes that are still to be added.
// NOTE: not a loop of fewer numbers every time, which would not be unrolled.
template <int kCount, int kMask = 16>
__device__ inline float warp_sums(const float (&x)[kCount]) {
  constexpr int kHalf = kCount > 1 ? kCount / 2 : 1;
  const bool upper = read_thread() & kMask;
  float sums[kHalf];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float &low = x[i], &high = x[kCount > 1 ? i + kHalf : i];
    sums[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, kMask);
  }
  if constexpr (kMask == 1) {
    return sums[0];
  } else {
    return warp_sums<kHalf, kMask / 2>(sums);
  }
}

// A lane's share of a group in float32, aligned to all of it.
template <int kCount>
__device__ inline void load_lanes(const float* from, float (&x)[kCount]) {
  static_assert(kCount == 2 || kCount == 4, "groups of 64 or 128");
  if constexpr (kCount == 4) {
    const float4 all = *reinterpret_cast<const float4*>(from);
    x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
  } else {
    const float2 all = *reinterpret_cast<const float2*>(from);
    x[0] = all.x, x[1] = all.y;
  }
}
template <int kCount>
__device__ inline void store_lanes(float* to, const float (&x)[kCount]) {
  if constexpr (kCount == 4) {
    *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
  } else {
    *reinterpret_cast<float2*>(to) = {x[0], x[1]};
  }
}

// +1 or -1 at this lane's coordinates.
template <int kGroup, const SignDiagonal& kDiagonal>
__device__ inline void lane_signs(float (&sign)[kPerLane<kGroup>]) {
  constexpr int kCount = kPerLane<kGroup>;
  const int first = (read_thread() & 31) * kCount;
  // Constants and a conditional: device code cannot index the host's diagonal.
  constexpr uint64_t kLow = kDiagonal.words[0], kHigh = kDiagonal.words[1];
  const uint64_t word = first < 64 ? kLow : kHigh;
#pragma unroll
  for (int e = 0; e < kCount; ++e) sign[e] = (word >> ((first + e) % 64)) & 1 ? 1.0f : -1.0f;
}

// Elements of a row as they are in memory, so that loading them does not wait for them.
template <int kCount>
class RowElements {
 public:
  __device__ void load(const Rows& rows, int64_t token, int head, int first) {
    const int64_t at = token * rows.token_stride + head * rows.head_stride + first;
    if (rows.dtype == Dtype::kFloat32) {
      load<uint32_t>(rows.data, at);
    } else {
      load<uint16_t>(rows.data, at);
    }
  }

  __device__ void convert(Dtype dtype, float (&x)[kCount]) const {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (dtype == Dtype::kBfloat16) {
        x[e] = __uint_as_float(bits_[e] << 16);
      } else if (dtype == Dtype::kFloat16) {
        x[e] = __half2float(__ushort_as_half(static_cast<unsigned short>(bits_[e])));
      } else {
        x[e] = __uint_as_float(bits_[e]);
      }
    }
  }

 private:
  template <typename Bits>
  __device__ void load(const void* data, int64_t at) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) bits_[e] = static_cast<const Bits*>(data)[at + e];
  }

  uint32_t bits_[kCount] = {};
};

template <typename T, int kCount>
__device__ inline void write_elements(void* data, int64_t at, const float (&x)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) static_cast<T*>(data)[at + e] = static_cast<T>(x[e]);
}

template <int kCount>
__device__ inline void write_row(const MutableRows& rows, int64_t token, int head, int first,
                                 const float (&x)[kCount]) {
  const int64_t at = token * rows.token_stride + head * rows.head_stride + first;
  switch (rows.dtype) {
    case Dtype::kBfloat16:
      return write_elements<__nv_bfloat16>(rows.data, at, x);
    case Dtype::kFloat16:
      return write_elements<__half>(rows.data, at, x);
    case Dtype::kFloat32:
      return write_elements<float>(rows.data, at, x);
  }
}

__device__ inline uint8_t* region_of(const Cache& cache, int64_t block, int64_t kv_head) {
  return cache.data + block * cache.block_stride_bytes + kv_head * cache.head_stride_bytes;
}

}  // namespace tq::cuda
