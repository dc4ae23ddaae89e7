// Arithmetic on codes with AVX2: scores by table, values in float32.
//
// Two coordinates' indices are four bits, and so are four coordinates' signs, so a query row
// becomes sixteen sums for each, which one byte shuffle looks up for 32 tokens. An entry is a
// number of 14 bits, of which two tables hold seven each: two entries add up in a byte before sums
// widen.
//
// NOTE: A score is exact to about 1e-4 of the spread of its row's scores, ten times finer than what
// rounding the query to bfloat16 does to it, but not float32's 1e-7.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/codes.h"
#include "cpu/values_float.h"

namespace tq::cpu {

// The codes of one group of up to 128 tokens and one KV head.
template <int kGroup>
class CodeTile : public FloatValues<kGroup, 128, 6> {
 public:
  static constexpr int kTokens = 128;   // tokens between two updates of the running maximum
  static constexpr int kScoreRows = 1;  // whose accumulators fit into registers
  static constexpr int kPairs = kGroup / 2, kQuads = kGroup / 4;
  static constexpr int kTables = kPairs + kQuads;

  // One group of a query row.
  struct Query {
    alignas(32) uint8_t table[kTables][2][16];  // low and high seven bits; pairs, then quads
    float step;                                 // what 1 in the tables stands for
    float base;                                 // what all zeros give

    // q1 and q2 are [kGroup]; q2 includes rho.
    void prepare(const float* q1, const float* q2) {
      using Book = Codebook<kGroup>;
      constexpr float kOuter = Book::kOuter, kInner = Book::kInner;
      float lowest[kTables], largest = 0;
      for (int k = 0; k < kPairs; ++k) {
        lowest[k] = -kOuter * (std::fabs(q1[2 * k]) + std::fabs(q1[2 * k + 1]));
      }
      for (int k = 0; k < kQuads; ++k) {
        const float* b = q2 + 4 * k;
        lowest[kPairs + k] =
            -(std::fabs(b[0]) + std::fabs(b[1]) + std::fabs(b[2]) + std::fabs(b[3]));
      }
      base = 0;
      for (const float low : lowest) {
        base += low;
        largest = -low > largest || std::isnan(low) ? -low : largest;
      }
      step = 2 * largest / kMaxEntry;
      const float inverse = largest > 0 ? 1 / step : 0;
      alignas(32) static constexpr float kFirst[16] = {
          -kOuter, -kInner, kInner, kOuter, -kOuter, -kInner, kInner, kOuter,
          -kOuter, -kInner, kInner, kOuter, -kOuter, -kInner, kInner, kOuter};
      alignas(32) static constexpr float kSecond[16] = {
          -kOuter, -kOuter, -kOuter, -kOuter, -kInner, -kInner, -kInner, -kInner,
          kInner,  kInner,  kInner,  kInner,  kOuter,  kOuter,  kOuter,  kOuter};
      for (int k = 0; k < kPairs; ++k) {
        const Lanes from = splat(-lowest[k] * inverse);
        const Lanes entry = fma(load(kFirst), splat(q1[2 * k] * inverse),
                                fma(load(kSecond), splat(q1[2 * k + 1] * inverse), from));
        write(entry, table[k]);
      }
      alignas(32) static constexpr float kSigns[4][16] = {
          {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
          {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
          {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
          {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1}};
      for (int k = 0; k < kQuads; ++k) {
        Lanes entry = splat(-lowest[kPairs + k] * inverse);
        for (int i = 0; i < 4; ++i) {
          entry = fma(load(kSigns[i]), splat(q2[4 * k + i] * inverse), entry);
        }
        write(entry, table[kPairs + k]);
      }
    }

   private:
    static void write(const Lanes& entry, uint8_t (*out)[16]) {
      const __m256i first = _mm256_cvtps_epi32((__m256)entry.part[0]);
      const __m256i second = _mm256_cvtps_epi32((__m256)entry.part[1]);
      const __m256i words = in_order(_mm256_packs_epi32(first, second));
      const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(127));
      const __m256i bytes = in_order(_mm256_packus_epi16(low, _mm256_srli_epi16(words, 7)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(out), bytes);
    }
    // Undo the interleaving of a pack: quarters 0, 2, 1, 3.
    static __m256i in_order(__m256i x) { return _mm256_permute4x64_epi64(x, 0xd8); }
  };

  void load_keys(const Unit* units, int num_units, const SlotLayout& layout, const BlockOffsets& at,
                 int g, int /*num_rows*/) {
    num_blocks_ = (num_units + 1) / 2;
    for (int block = 0; block < num_blocks_; ++block) {
      const Unit& first = units[2 * block];
      const Unit& second = units[std::min(2 * block + 1, num_units - 1)];
      const auto split = [&](int64_t rows_at, int stride, int num_bytes, int table) {
        const uint8_t* a = first.region + rows_at + int64_t{first.offset} * stride;
        const uint8_t* b = second.region + rows_at + int64_t{second.offset} * stride;
        if (num_bytes == 8) {  // signs of a head of 64 coordinates, without gaps
          split_columns<8>(a, b, 16, block, table);
          return;
        }
        for (int i = 0; i < num_bytes; i += 16) {
          split_columns<16>(a + i, b + i, stride, block, table + 2 * i);
        }
      };
      split(at.key_index + g * kGroup / 4, layout.index_bytes(), kGroup / 4, 0);
      split(at.key_sign + g * kGroup / 8, layout.sign_bytes(), kGroup / 8, kPairs);
    }
  }

  // Add alpha * <q, key> to scores[num_rows][kTokens], or set them to it for the first group.
  void score(const Query* queries, int num_rows, const float* alpha, bool first,
             float (*scores)[kTokens]) const {
    for (int r = 0; r < num_rows; ++r) {
      int block = 0;
      for (; block + 2 <= num_blocks_; block += 2) {
        score_blocks<2>(queries[r], block, alpha, first, scores[r]);
      }
      if (block < num_blocks_) score_blocks<1>(queries[r], block, alpha, first, scores[r]);
    }
  }

 private:
  static constexpr int kMaxEntry = (1 << 14) - 1;

  // Read kColumns columns of codes, two a byte, of sixteen tokens at `a` and sixteen at `b`. Of
  // eight columns a row of 16 bytes is two tokens.
  template <int kColumns>
  void split_columns(const uint8_t* a, const uint8_t* b, int64_t stride, int block, int table) {
    __m256i x[kColumns], y[kColumns];
    for (int i = 0; i < kColumns; ++i) {
      const auto* low = reinterpret_cast<const __m128i*>(a + i * stride);
      const auto* high = reinterpret_cast<const __m128i*>(b + i * stride);
      x[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)),
                                     _mm_loadu_si128(high), 1);
    }
    // Each step rotates the bits of (row, byte) by one: after four, tokens are bytes.
    for (int step = 0; step < 2; ++step) {
      rotate_once(x, y);
      rotate_once(y, x);
    }
    const __m256i nibble = _mm256_set1_epi8(15);
    for (int i = 0; i < kColumns; ++i) {
      keys_[table + 2 * i][block] = _mm256_and_si256(x[i], nibble);
      keys_[table + 2 * i + 1][block] = _mm256_and_si256(_mm256_srli_epi16(x[i], 4), nibble);
    }
  }

  template <int kColumns>
  static void rotate_once(const __m256i (&from)[kColumns], __m256i (&to)[kColumns]) {
    for (int i = 0; i < kColumns / 2; ++i) {
      to[2 * i] = _mm256_unpacklo_epi8(from[i], from[i + kColumns / 2]);
      to[2 * i + 1] = _mm256_unpackhi_epi8(from[i], from[i + kColumns / 2]);
    }
  }

  // Sums of bytes in sixteen bits: of the odd ones, and of 256 times them plus the even ones,
  // modulo 2^16, from which the even ones follow.
  struct ByteSums {
    __m256i all = _mm256_setzero_si256(), odd = _mm256_setzero_si256();
    static_assert(kTables / 2 * 254 < 1 << 15, "sums are read as signed numbers");

    void add(__m256i bytes) {
      all = _mm256_add_epi16(all, bytes);
      odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
    }
    __m256i even() const { return _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8)); }
  };

  template <int kCount>
  void score_blocks(const Query& query, int block, const float* alpha, bool first,
                    float* scores) const {
    ByteSums low[kCount], high[kCount];
    for (int k = 0; k < kTables; k += 2) {
      const __m256i low0 = both_lanes(query.table[k][0]), high0 = both_lanes(query.table[k][1]);
      const __m256i low1 = both_lanes(query.table[k + 1][0]);
      const __m256i high1 = both_lanes(query.table[k + 1][1]);
#pragma GCC unroll 2
      for (int b = 0; b < kCount; ++b) {
        const __m256i code0 = keys_[k][block + b], code1 = keys_[k + 1][block + b];
        low[b].add(
            _mm256_add_epi8(_mm256_shuffle_epi8(low0, code0), _mm256_shuffle_epi8(low1, code1)));
        high[b].add(
            _mm256_add_epi8(_mm256_shuffle_epi8(high0, code0), _mm256_shuffle_epi8(high1, code1)));
      }
    }
    const __m256 step = _mm256_set1_ps(query.step), base = _mm256_set1_ps(query.base);
    for (int b = 0; b < kCount; ++b) {
      // Even tokens, and odd ones, times 1 and 128; lanes of 128 bits are units.
      __m256i even[2], odd[2];
      widen(low[b].even(), high[b].even(), even);
      widen(low[b].odd, high[b].odd, odd);
      for (int half = 0; half < 2; ++half) {
        const __m256i x = _mm256_unpacklo_epi32(even[half], odd[half]);
        const __m256i y = _mm256_unpackhi_epi32(even[half], odd[half]);
        for (int unit = 0; unit < 2; ++unit) {
          const __m256i sum =
              unit ? _mm256_permute2x128_si256(x, y, 0x31) : _mm256_permute2x128_si256(x, y, 0x20);
          const int t = (block + b) * 32 + unit * 16 + half * 8;
          const __m256 dot = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), step, base);
          const __m256 before = first ? _mm256_setzero_ps() : _mm256_load_ps(scores + t);
          _mm256_store_ps(scores + t, _mm256_fmadd_ps(_mm256_load_ps(alpha + t), dot, before));
        }
      }
    }
  }

  // out[2] = low + 128 high in 32 bits, of the lower and upper half of each lane of 128 bits.
  static void widen(__m256i low, __m256i high, __m256i* out) {
    const __m256i weights = _mm256_set1_epi32(128 << 16 | 1);
    out[0] = _mm256_madd_epi16(_mm256_unpacklo_epi16(low, high), weights);
    out[1] = _mm256_madd_epi16(_mm256_unpackhi_epi16(low, high), weights);
  }

  static __m256i both_lanes(const uint8_t* x) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(x)));
  }

  int num_blocks_;
  __m256i keys_[kTables][kTokens / 32];  // four bits a token
};

}  // namespace tq::cpu
