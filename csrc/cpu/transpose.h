// Transposes of packed codes: from a row per token to a lane per token. AVX-512.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace tq::cpu {

// Read rows of kWords 32-bit words of sixteen tokens, `stride_bytes` apart, into words[kWords].
template <int kWords>
inline void transpose_words(const uint8_t* rows, int64_t stride_bytes, __m512i* words) {
  const auto row = [&](int t) { return rows + t * stride_bytes; };
  if constexpr (kWords == 8) {
    __m512i a[8], b[8];
    for (int k = 0; k < 8; ++k) {
      const auto* low = reinterpret_cast<const __m256i*>(row(k));
      const auto* high = reinterpret_cast<const __m256i*>(row(k + 8));
      a[k] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(low)),
                                _mm256_loadu_si256(high), 1);
    }
    for (int k = 0; k < 8; k += 2) {
      b[k] = _mm512_unpacklo_epi32(a[k], a[k + 1]);
      b[k + 1] = _mm512_unpackhi_epi32(a[k], a[k + 1]);
    }
    for (int k = 0; k < 8; k += 4) {
      for (int i = 0; i < 2; ++i) {
        a[k + 2 * i] = _mm512_unpacklo_epi64(b[k + i], b[k + 2 + i]);
        a[k + 2 * i + 1] = _mm512_unpackhi_epi64(b[k + i], b[k + 2 + i]);
      }
    }
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const __m512i high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int w = 0; w < 4; ++w) {
      words[w] = _mm512_permutex2var_epi64(a[w], low, a[w + 4]);
      words[w + 4] = _mm512_permutex2var_epi64(a[w], high, a[w + 4]);
    }
  } else if constexpr (kWords == 4) {
    __m512i a[4], b[4];
    for (int k = 0; k < 4; ++k) {
      const auto part = [&](int t) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row(t)));
      };
      a[k] = _mm512_castsi128_si512(part(k));
      a[k] = _mm512_inserti32x4(a[k], part(k + 4), 1);
      a[k] = _mm512_inserti32x4(a[k], part(k + 8), 2);
      a[k] = _mm512_inserti32x4(a[k], part(k + 12), 3);
    }
    for (int k = 0; k < 4; k += 2) {
      b[k] = _mm512_unpacklo_epi32(a[k], a[k + 1]);
      b[k + 1] = _mm512_unpackhi_epi32(a[k], a[k + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      words[2 * i] = _mm512_unpacklo_epi64(b[i], b[2 + i]);
      words[2 * i + 1] = _mm512_unpackhi_epi64(b[i], b[2 + i]);
    }
  } else {
    static_assert(kWords == 2, "rows of two words are a head of 64 coordinates, without gaps");
    const __m512i a = _mm512_loadu_si512(rows), b = _mm512_loadu_si512(rows + 64);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14,  //
                                           16, 18, 20, 22, 24, 26, 28, 30);
    words[0] = _mm512_permutex2var_epi32(a, even, b);
    words[1] = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
  }
}

}  // namespace tq::cpu
