// Codes as operands of matrix instructions, without a table in memory.
//
// A permutation of the coordinates that queries and keys share changes no score, and one of the
// values is undone when the output is written, so a lane decodes whole words in the order that
// costs least: PRMT looks four 2-bit codes up in a register of four bytes, and a mask leaves one
// sign bit to a byte.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "core/codebook.h"
#include "cuda/ptx.cuh"

namespace tq::cuda {

// Centroids as small integers: kUnit * {-kOuter, -kInner, kInner, kOuter}, within 0.1 % of the
// codebook.
template <int kGroup>
struct IntegerBook {
  static constexpr int kInner = kGroup == 64 ? 38 : 37;
  static constexpr int kOuter = kGroup == 64 ? 126 : 123;
  static constexpr float kUnit =
      (Codebook<kGroup>::kInner * kInner + Codebook<kGroup>::kOuter * kOuter) /
      (kInner * kInner + kOuter * kOuter);
  static constexpr uint32_t kTable = (256u - kOuter) | (256u - kInner) << 8 |
                                     static_cast<uint32_t>(kInner) << 16 |
                                     static_cast<uint32_t>(kOuter) << 24;
};

// Centroids as the high bytes of float16 numbers: kUnit * {-1.25, -0.375, 0.375, 1.25}, within 0.4
// %.
template <int kGroup>
struct HalfBook {
  static constexpr float kUnit =
      (Codebook<kGroup>::kInner * 0.375f + Codebook<kGroup>::kOuter * 1.25f) /
      (0.375f * 0.375f + 1.25f * 1.25f);
  static constexpr uint32_t kTable = 0x3d36b6bd;
};

// Where a coordinate stands in the operands of a key's matrix products. Product j has k = 0..31:
// half k / 16, lane t = k / 4 % 4, byte e = k % 4. Lane t decodes coordinates t * kGroup / 4
// onwards.
struct OperandPosition {
  int product, half, lane, byte;
};

template <int kGroup>
__device__ inline OperandPosition index_position(int coordinate) {
  const int local = coordinate % (kGroup / 4);
  return {2 * (local / 16) + (local & 1), (local >> 3) & 1, coordinate / (kGroup / 4),
          (local >> 1) & 3};
}

// A sign bit is worth 2^p, p = sign_power(coordinate), and -128 for p = 7.
__device__ inline int sign_power(int coordinate) { return 4 + (coordinate & 3); }

template <int kGroup>
__device__ inline OperandPosition sign_position(int coordinate) {
  const int local = coordinate % (kGroup / 4), power = sign_power(coordinate);
  const bool shifted = local % 8 < 4;
  const int lane = coordinate / (kGroup / 4), product = (power - 4) >> 1;
  if (kGroup == 64) return {product, power & 1, lane, local / 8 + (shifted ? 2 : 0)};
  return {product + (shifted ? 2 : 0), power & 1, lane, local / 8};
}

// Look four codes up in a register of four bytes. Selectors have no bit but the lowest two of a
// nibble set.
__device__ inline uint32_t look_up(uint32_t table, uint32_t selectors) {
  return prmt(table, selectors);
}

// The upper half, as a selector; so it is masked only once.
__device__ inline uint32_t upper_half(uint32_t x) { return shift_right_16(x); }

// Sixteen 2-bit codes to int8: out[2 i + h] is half h of product i (of the two that the word
// feeds).
__device__ inline void expand_index(uint32_t table, uint32_t word, uint32_t (&out)[4]) {
  const uint32_t even = word & 0x33333333u, odd = (word >> 2) & 0x33333333u;
  out[0] = look_up(table, even);
  out[1] = look_up(table, upper_half(even));
  out[2] = look_up(table, odd);
  out[3] = look_up(table, upper_half(odd));
}

// Four of a byte's eight signs to int8 each: out[2 i + h] is half h of product i.
__device__ inline void expand_signs(uint32_t word, uint32_t (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = word & (0x10101010u << i);
}

// Codes of eight coordinates of two tokens to float16 pairs (first token, second token).
// tokens: {byte 0 of the first, byte 0 of the second, byte 1 of the first, byte 1 of the second}.
__device__ inline void expand_values(uint32_t table, uint32_t tokens, uint32_t (&out)[8]) {
  const uint32_t even = tokens & 0x33333333u, odd = (tokens >> 2) & 0x33333333u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // High bytes: {code c, code c + 2} of the first token, then of the second; c = 4 (i / 2) + i
    // % 2.
    const uint32_t codes = i & 1 ? odd : even;
    const uint32_t high = look_up(table, i & 2 ? upper_half(codes) : codes);
    const int c = 4 * (i >> 1) + (i & 1);
    out[c] = __byte_perm(high, 0, 0x2404);
    out[c + 2] = high & 0xff00ff00u;
  }
}

// Sixteen 8-bit copies of keys in the order of expand_index.
__device__ inline void order_copies(const uint4& copies, uint32_t (&out)[4]) {
  out[0] = __byte_perm(copies.x, copies.y, 0x6420);
  out[1] = __byte_perm(copies.z, copies.w, 0x6420);
  out[2] = __byte_perm(copies.x, copies.y, 0x7531);
  out[3] = __byte_perm(copies.z, copies.w, 0x7531);
}

// Eight 8-bit copies of values of two tokens to float16 pairs (first token, second token).
__device__ inline void expand_copies(const uint2& first, const uint2& second, uint32_t (&out)[8]) {
  // 0x6400 | b is 1024 + b.
  const __half2 zero = __half2half2(__ushort_as_half(0x6480));  // 1024 + 128
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const uint32_t a = (c < 4 ? first.x : first.y) ^ 0x80808080u;
    const uint32_t b = (c < 4 ? second.x : second.y) ^ 0x80808080u;
    const uint32_t bytes = __byte_perm(a, b, c % 4 | (4 + c % 4) << 8);
    const uint32_t biased = __byte_perm(bytes, 0x64646464u, 0x4240);
    const __half2 pair = __hsub2(*reinterpret_cast<const __half2*>(&biased), zero);
    out[c] = *reinterpret_cast<const uint32_t*>(&pair);
  }
}

}  // namespace tq::cuda
