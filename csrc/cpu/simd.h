// Sixteen lanes of float or uint32, one per token, on AVX-512, AVX2 or whatever the compiler
// targets.
//
// Arithmetic uses the vector types of GCC and Clang; intrinsics stand only where the language has
// no word for the instruction. Addition, subtraction and multiplication round like scalar code, on
// every target.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/codebook.h"
#include "core/half.h"

namespace tq {

inline constexpr int kLanes = 16;

#if defined(__AVX512F__)
inline constexpr int kPartBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kPartBytes = 32;
#else
inline constexpr int kPartBytes = 16;
#endif
inline constexpr int kParts = kLanes * 4 / kPartBytes;

typedef float FloatPart __attribute__((vector_size(kPartBytes)));
typedef uint32_t WordPart __attribute__((vector_size(kPartBytes)));

struct Lanes {
  FloatPart part[kParts];
};

struct Words {
  WordPart part[kParts];
};

#define TQ_EACH_PART for (int i = 0; i < kParts; ++i)

inline Lanes splat(float x) {
  Lanes r;
  TQ_EACH_PART r.part[i] = x - FloatPart{};  // x - 0 keeps the sign of zero
  return r;
}
inline Words splat(uint32_t x) {
  Words r;
  TQ_EACH_PART r.part[i] = x + WordPart{};
  return r;
}
// NOTE: part by part, because GCC copies larger structs in smaller pieces through the stack, where
// the load that follows has to wait for them.
inline Lanes load(const float* x) {
  Lanes r;
  TQ_EACH_PART std::memcpy(&r.part[i], x + i * (kPartBytes / 4), kPartBytes);
  return r;
}
inline Words load(const uint32_t* x) {
  Words r;
  TQ_EACH_PART std::memcpy(&r.part[i], x + i * (kPartBytes / 4), kPartBytes);
  return r;
}
inline void store(float* x, const Lanes& a) {
  TQ_EACH_PART std::memcpy(x + i * (kPartBytes / 4), &a.part[i], kPartBytes);
}
inline void store(uint32_t* x, const Words& a) {
  TQ_EACH_PART std::memcpy(x + i * (kPartBytes / 4), &a.part[i], kPartBytes);
}

inline Lanes operator+(Lanes a, const Lanes& b) {
  TQ_EACH_PART a.part[i] += b.part[i];
  return a;
}
inline Lanes operator-(Lanes a, const Lanes& b) {
  TQ_EACH_PART a.part[i] -= b.part[i];
  return a;
}
inline Lanes operator*(Lanes a, const Lanes& b) {
  TQ_EACH_PART a.part[i] *= b.part[i];
  return a;
}
inline Lanes operator/(Lanes a, const Lanes& b) {
  TQ_EACH_PART a.part[i] /= b.part[i];
  return a;
}
inline Words operator|(Words a, const Words& b) {
  TQ_EACH_PART a.part[i] |= b.part[i];
  return a;
}
inline Words operator&(Words a, const Words& b) {
  TQ_EACH_PART a.part[i] &= b.part[i];
  return a;
}
inline Words operator+(Words a, const Words& b) {
  TQ_EACH_PART a.part[i] += b.part[i];
  return a;
}
inline Words operator<<(Words a, int bits) {
  TQ_EACH_PART a.part[i] <<= bits;
  return a;
}
inline Words operator>>(Words a, int bits) {
  TQ_EACH_PART a.part[i] >>= bits;
  return a;
}
inline Words max(Words a, const Words& b) {
  TQ_EACH_PART a.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return a;
}

// All ones where the comparison holds. A comparison with NaN does not.
inline Words operator>(const Lanes& a, const Lanes& b) {
  Words r;
  TQ_EACH_PART r.part[i] = (WordPart)(a.part[i] > b.part[i]);
  return r;
}
inline Words operator>=(const Lanes& a, const Lanes& b) {
  Words r;
  TQ_EACH_PART r.part[i] = (WordPart)(a.part[i] >= b.part[i]);
  return r;
}

inline Words as_words(const Lanes& a) {
  Words r;
  TQ_EACH_PART r.part[i] = (WordPart)a.part[i];
  return r;
}
inline Lanes as_lanes(const Words& a) {
  Lanes r;
  TQ_EACH_PART r.part[i] = (FloatPart)a.part[i];
  return r;
}
inline Lanes where(const Words& mask, const Lanes& a, const Lanes& b) {
  Words r;
  const Words x = as_words(a), y = as_words(b);
  TQ_EACH_PART r.part[i] = (x.part[i] & mask.part[i]) | (y.part[i] & ~mask.part[i]);
  return as_lanes(r);
}

// a * b + c, fused where the target can.
inline Lanes fma(const Lanes& a, const Lanes& b, Lanes c) {
  TQ_EACH_PART {
#if defined(__AVX512F__)
    c.part[i] = (FloatPart)_mm512_fmadd_ps((__m512)a.part[i], (__m512)b.part[i], (__m512)c.part[i]);
#elif defined(__FMA__)
    c.part[i] = (FloatPart)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
#else
    c.part[i] += a.part[i] * b.part[i];
#endif
  }
  return c;
}

// c plus b in the lanes whose word has bit `bit` set.
inline Lanes add_where_bit(Lanes c, const Words& words, int bit, const Lanes& b) {
  TQ_EACH_PART {
#if defined(__AVX512F__)
    const __mmask16 mask =
        _mm512_test_epi32_mask((__m512i)words.part[i], _mm512_set1_epi32(1 << bit));
    c.part[i] = (FloatPart)_mm512_mask_add_ps((__m512)c.part[i], mask, (__m512)c.part[i],
                                              (__m512)b.part[i]);
#else
    const WordPart mask = 0 - ((words.part[i] >> bit) & 1);
    c.part[i] += (FloatPart)((WordPart)b.part[i] & mask);
#endif
  }
  return c;
}

// Centroids of the 2-bit indices in the lowest bits of each word; the other bits do not matter.
template <int kGroup>
inline Lanes centroid(const Words& words) {
  using Book = Codebook<kGroup>;
  Lanes r;
  TQ_EACH_PART {
#if defined(__AVX512F__)
    const __m512 table = _mm512_broadcast_f32x4(
        _mm_setr_ps(-Book::kOuter, -Book::kInner, Book::kInner, Book::kOuter));
    r.part[i] = (FloatPart)_mm512_permutevar_ps(table, (__m512i)words.part[i]);
#elif defined(__AVX2__)
    const __m256 table =
        _mm256_setr_ps(-Book::kOuter, -Book::kInner, Book::kInner, Book::kOuter,  //
                       -Book::kOuter, -Book::kInner, Book::kInner, Book::kOuter);
    r.part[i] = (FloatPart)_mm256_permutevar_ps(table, (__m256i)words.part[i]);
#else
    const WordPart code = words.part[i];
    const WordPart inner = 0 - ((code ^ (code >> 1)) & 1);  // indices 1 and 2
    const WordPart sign = (~code & 2) << 30;
    r.part[i] =
        (FloatPart)((bits_of(Book::kInner) & inner) | (bits_of(Book::kOuter) & ~inner) | sign);
#endif
  }
  return r;
}

// The sixteen 2-bit indices of the four bytes at `x`, one in the lowest bits of each lane; lanes
// are coordinates here.
inline Words spread_indices(const uint8_t* x) {
  static constexpr uint32_t kShifts[kLanes] = {0,  2,  4,  6,  8,  10, 12, 14,
                                               16, 18, 20, 22, 24, 26, 28, 30};
  uint32_t word;
  std::memcpy(&word, x, sizeof word);
  Words r = splat(word);
  const Words shifts = load(kShifts);
  TQ_EACH_PART r.part[i] >>= shifts.part[i];
  return r;
}

inline float reduce_max(const Lanes& a) {
  float x[kLanes];
  store(x, a);
  float r = x[0];
  for (int i = 1; i < kLanes; ++i) r = x[i] > r ? x[i] : r;
  return r;
}

inline float reduce_add(const Lanes& a) {
  float x[kLanes];
  store(x, a);
  float r = 0;
  for (int i = 0; i < kLanes; ++i) r += x[i];
  return r;
}

// e^x for x <= 0, relative error below 2e-7; 0 below -87; NaN for NaN.
inline Lanes exp_nonpositive(const Lanes& x) {
  constexpr float kLowest = -87.0f;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  constexpr float kRound = 12582912.0f;
  const Words too_low = splat(kLowest) > x;
  const Lanes clamped = where(too_low, splat(kLowest), x);
  const Lanes rounded = fma(clamped, splat(1.44269504f), splat(kRound));
  const Lanes n = rounded - splat(kRound);
  Lanes r =
      fma(n, splat(-0.693145752f), clamped);  // ln 2 in two parts, the first exact when times n
  r = fma(n, splat(-1.42860677e-6f), r);
  Lanes p = splat(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, splat(c));
  const Words power = (as_words(rounded) + splat(127u - bits_of(kRound))) << 23;
  return where(too_low, splat(0.0f), p * as_lanes(power));
}

// Sixteen float16 values.
inline Lanes load_half(const uint16_t* x) {
#if defined(__AVX512F__)
  Lanes r;
  r.part[0] = (FloatPart)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return r;
#elif defined(__F16C__)
  Lanes r;
  for (int i = 0; i < kParts; ++i) {
    const auto* part = reinterpret_cast<const __m128i*>(x + 8 * i);
    r.part[i] = (FloatPart)_mm256_cvtph_ps(_mm_loadu_si128(part));
  }
  return r;
#else
  float r[kLanes];
  for (int i = 0; i < kLanes; ++i) r[i] = float_from_half(x[i]);
  return load(r);
#endif
}

#undef TQ_EACH_PART

}  // namespace tq
