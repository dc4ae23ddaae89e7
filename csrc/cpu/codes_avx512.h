// Arithmetic on codes in integers: AVX-512 with VNNI.
//
// Scores by table: two coordinates of a key are 6 bits (two indices, two signs), so a query row
// becomes 64 sums in int16 per pair of coordinates, and one permute looks 32 tokens up. Every few
// pairs the int16 sums move to int32; a table's step is the smallest that cannot overflow before.
//
// Values: the centroids are integers over a common step to 1e-4, the weights 14-bit integers in two
// bytes, so that one dot-product instruction does four tokens of sixteen coordinates.
//
// NOTE: A score is exact to about 1e-4 of the spread of its row's scores, ten times finer than what
// rounding the query to bfloat16 does to it, but not float32's 1e-7.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/codes.h"
#include "cpu/transpose.h"

namespace tq::cpu {

// Centroids as integers: -kOuter, -kInner, kInner, kOuter in steps of Codebook::kOuter / kOuter.
template <int kGroup>
struct IntCodebook {
  static constexpr int kOuter = kGroup == 64 ? 209 : 163;
  static constexpr int kInner = kGroup == 64 ? 63 : 49;
  static constexpr float kStep = Codebook<kGroup>::kOuter / kOuter;
  static constexpr float kError = kInner * kStep / Codebook<kGroup>::kInner - 1;
  static_assert(-1e-4f < kError && kError < 1e-4f, "integers must represent the levels to 1e-4");
};

// The codes of one group of up to kTokens tokens and one KV head, decoded once for all query rows.
template <int kGroup>
class CodeTile {
 public:
  static constexpr int kTokens = 128;  // tokens between two updates of the running maximum
  static constexpr int kScoreRows = 2, kValueRows = 4;  // whose accumulators fit into registers
  static constexpr int kPairs = kGroup / 2;

  // One group of a query row.
  struct Query {
    alignas(64) int16_t table[kPairs][64];  // by index of coordinates 2k, 2k + 1, then their signs
    alignas(64) float step;                 // what 1 in the table stands for

    // q1 and q2 are [kGroup]; q2 includes rho.
    void prepare(const float* q1, const float* q2) {
      using Book = Codebook<kGroup>;
      float largest = 0;
      for (int j = 0; j < kGroup; j += 2 * kPairsPerSum) {
        float sum = 0;
        for (int i = j; i < j + 2 * kPairsPerSum; ++i) {
          sum += std::fabs(q1[i]) * Book::kOuter + std::fabs(q2[i]);
        }
        largest = sum > largest || std::isnan(sum) ? sum : largest;
      }
      step = largest / 32752;  // leaves room for the rounding of 8 entries
      const float inverse = largest > 0 ? 1 / step : 0;
      alignas(64) static constexpr float kLow[16] = {
          -Book::kOuter, -Book::kInner, Book::kInner, Book::kOuter,  //
          -Book::kOuter, -Book::kInner, Book::kInner, Book::kOuter,  //
          -Book::kOuter, -Book::kInner, Book::kInner, Book::kOuter,  //
          -Book::kOuter, -Book::kInner, Book::kInner, Book::kOuter};
      alignas(64) static constexpr float kHigh[16] = {
          -Book::kOuter, -Book::kOuter, -Book::kOuter, -Book::kOuter,  //
          -Book::kInner, -Book::kInner, -Book::kInner, -Book::kInner,  //
          Book::kInner,  Book::kInner,  Book::kInner,  Book::kInner,   //
          Book::kOuter,  Book::kOuter,  Book::kOuter,  Book::kOuter};
      for (int k = 0; k < kPairs; ++k) {
        const float* a = q1 + 2 * k;
        const float* b = q2 + 2 * k;
        const Lanes index =
            fma(load(kLow), splat(a[0] * inverse), load(kHigh) * splat(a[1] * inverse));
        for (int s = 0; s < 4; ++s) {
          const float sign = ((s & 1 ? b[0] : -b[0]) + (s & 2 ? b[1] : -b[1])) * inverse;
          const __m512i entry = _mm512_cvtps_epi32((__m512)(index + splat(sign)).part[0]);
          _mm256_store_si256(reinterpret_cast<__m256i*>(&table[k][16 * s]),
                             _mm512_cvtsepi32_epi16(entry));
        }
      }
    }
  };

  void load_keys(const Unit* units, int num_units, const SlotLayout& layout, const BlockOffsets& at,
                 int g, int /*num_rows*/) {
    num_blocks_ = (num_units + 1) / 2;
    for (int block = 0; block < num_blocks_; ++block) {
      __m512i index[2][kGroup / 16], sign[2][kGroup / 32];
      for (int half = 0; half < 2; ++half) {
        const Unit& unit = units[std::min(2 * block + half, num_units - 1)];
        transpose_words<kGroup / 16>(unit.region + at.key_index + g * kGroup / 4 +
                                         int64_t{unit.offset} * layout.index_bytes(),
                                     layout.index_bytes(), index[half]);
        transpose_words<kGroup / 32>(
            unit.region + at.key_sign + g * kGroup / 8 + int64_t{unit.offset} * layout.sign_bytes(),
            layout.sign_bytes(), sign[half]);
      }
      // 16-bit lanes: the first unit's tokens are the even ones.
      for (int w = 0; w < kGroup / 16; ++w) {
        const __m512i indices[2] = {low_halves(index[0][w], index[1][w]),
                                    high_halves(index[0][w], index[1][w])};
        const __m512i a = sign[0][w / 2], b = sign[1][w / 2];
        const __m512i signs = w % 2 ? high_halves(a, b) : low_halves(a, b);
        for (int p = 0; p < 8;
             ++p) {  // bits 0 to 3 index, bits 4 and 5 sign; the others do not matter
          const __m512i low = _mm512_srli_epi16(indices[p / 4], 4 * (p % 4));
          const __m512i high = p < 2 ? _mm512_slli_epi16(signs, p < 2 ? 4 - 2 * p : 0)
                                     : _mm512_srli_epi16(signs, p < 2 ? 0 : 2 * p - 4);
          keys_[w * 8 + p][block] =
              _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), low, high, 0xca);  // select
        }
      }
    }
  }

  // Add alpha * <q, key> to scores[num_rows][kTokens], or set them to it for the first group.
  void score(const Query* queries, int num_rows, const float* alpha, bool first,
             float (*scores)[kTokens]) const {
    for (int r = 0; r < num_rows; r += 2) {
      if (r + 1 < num_rows) {
        score_rows<2>(queries + r, alpha, first, scores + r);
      } else {
        score_rows<1>(queries + r, alpha, first, scores + r);
      }
    }
  }

  void load_values(const Unit* units, int num_units, const SlotLayout& layout,
                   const BlockOffsets& at, int g) {
    num_quads_ = 4 * num_units;
    constexpr int kBytes = kGroup / 4;  // of one token
    // Byte 4 a + b of a 128-bit lane to 4 b + a: dwords of four tokens become columns.
    const __m512i columns =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    constexpr int kOuter = IntCodebook<kGroup>::kOuter, kInner = IntCodebook<kGroup>::kInner;
    constexpr char c[4] = {0, static_cast<char>((kOuter - kInner) / 2),
                           static_cast<char>((kOuter + kInner) / 2), static_cast<char>(kOuter)};
    const __m512i low_code =
        _mm512_broadcast_i32x4(_mm_setr_epi8(c[0], c[1], c[2], c[3], c[0], c[1], c[2], c[3], c[0],
                                             c[1], c[2], c[3], c[0], c[1], c[2], c[3]));
    const __m512i high_code =
        _mm512_broadcast_i32x4(_mm_setr_epi8(c[0], c[0], c[0], c[0], c[1], c[1], c[1], c[1], c[2],
                                             c[2], c[2], c[2], c[3], c[3], c[3], c[3]));
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int u = 0; u < num_units; ++u) {
      const uint8_t* row = units[u].region + at.value_index + g * kBytes +
                           int64_t{units[u].offset} * layout.index_bytes();
      for (int quad = 0; quad < 4; ++quad, row += 4 * layout.index_bytes()) {
        __m512i bytes[kBytes / 16];
        gather_quad(row, layout.index_bytes(), bytes);
        __m512i* out = values_[4 * u + quad];
        for (int i = 0; i < kBytes / 16; ++i) {
          const __m512i x = _mm512_shuffle_epi8(bytes[i], columns);
          const __m512i low = _mm512_and_si512(x, nibble);
          const __m512i high = _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble);
          out[4 * i] = _mm512_shuffle_epi8(low_code, low);
          out[4 * i + 1] = _mm512_shuffle_epi8(high_code, low);
          out[4 * i + 2] = _mm512_shuffle_epi8(low_code, high);
          out[4 * i + 3] = _mm512_shuffle_epi8(high_code, high);
        }
      }
    }
  }

  // Coordinate of a group that position `i` of out[kGroup] stands for.
  static constexpr int coordinate(int i) { return i / 64 * 64 + i % 16 * 4 + i / 16 % 4; }

  // Add weights[num_rows][kTokens] times values to out[num_rows][kGroup].
  void add_values(const float (*weights)[kTokens], int num_rows, float* const* out) const {
    int r = 0;
    for (; r + 4 <= num_rows; r += 4) add_rows<4>(weights + r, out + r);
    switch (num_rows - r) {
      case 3:
        add_rows<3>(weights + r, out + r);
        break;
      case 2:
        add_rows<2>(weights + r, out + r);
        break;
      case 1:
        add_rows<1>(weights + r, out + r);
        break;
    }
  }

 private:
  // Keep a value in a register: without it GCC loads keys once per row and reorders sums until they
  // spill.
  static __m512i pin(__m512i x) {
    asm("" : "+v"(x));
    return x;
  }

  static constexpr int kBlocks = kTokens / 32;
  static constexpr int kPairsPerSum = 4;

  // 16-bit lanes: even ones from `even`, odd ones from `odd`.
  static __m512i low_halves(__m512i even, __m512i odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
  }
  static __m512i high_halves(__m512i even, __m512i odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
  }

  // 128-bit lane k of bytes[] gets dword k of four rows.
  static void gather_quad(const uint8_t* row, int64_t stride, __m512i* bytes) {
    if constexpr (kGroup == 64) {
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      bytes[0] = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(row));
    } else {
      const auto part = [&](int t) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + t * stride));
      };
      const __m512i a = _mm512_inserti64x4(_mm512_castsi256_si512(part(0)), part(1), 1);
      const __m512i b = _mm512_inserti64x4(_mm512_castsi256_si512(part(2)), part(3), 1);
      const __m512i order =
          _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
      bytes[0] = _mm512_permutex2var_epi32(a, order, b);
      bytes[1] = _mm512_permutex2var_epi32(a, _mm512_add_epi32(order, _mm512_set1_epi32(4)), b);
    }
  }

  template <int kRows>
  void score_rows(const Query* queries, const float* alpha, bool first,
                  float (*scores)[kTokens]) const {
    int block = 0;
    for (; block + 4 <= num_blocks_; block += 4) {
      score_blocks<kRows, 4>(queries, block, alpha, first, scores);
    }
    if (block + 2 <= num_blocks_) {
      score_blocks<kRows, 2>(queries, block, alpha, first, scores);
      block += 2;
    }
    if (block < num_blocks_) score_blocks<kRows, 1>(queries, block, alpha, first, scores);
  }

  template <int kRows, int kCount>
  void score_blocks(const Query* queries, int block, const float* alpha, bool first,
                    float (*scores)[kTokens]) const {
    const __m512i take_even = _mm512_set1_epi32(1), take_odd = _mm512_set1_epi32(1 << 16);
    __m512i even[kRows][kCount] = {}, odd[kRows][kCount] = {};
    for (int k = 0; k < kPairs; k += kPairsPerSum) {
      __m512i sum[kRows][kCount] = {};
#pragma GCC unroll 2
      for (int p = k; p < k + kPairsPerSum; ++p) {
        __m512i key[kCount];
#pragma GCC unroll 4
        for (int b = 0; b < kCount; ++b) key[b] = pin(keys_[p][block + b]);
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
          const __m512i low = _mm512_load_si512(&queries[r].table[p][0]);
          const __m512i high = _mm512_load_si512(&queries[r].table[p][32]);
#pragma GCC unroll 4
          for (int b = 0; b < kCount; ++b) {
            sum[r][b] =
                pin(_mm512_add_epi16(sum[r][b], _mm512_permutex2var_epi16(low, key[b], high)));
          }
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int b = 0; b < kCount; ++b) {
          even[r][b] = _mm512_dpwssd_epi32(even[r][b], sum[r][b], take_even);
          odd[r][b] = _mm512_dpwssd_epi32(odd[r][b], sum[r][b], take_odd);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const __m512 step = _mm512_set1_ps(queries[r].step);
      for (int b = 0; b < kCount; ++b) {
        for (int half = 0; half < 2; ++half) {
          const int t = (block + b) * 32 + half * 16;
          const __m512 dot = _mm512_mul_ps(_mm512_cvtepi32_ps(half ? odd[r][b] : even[r][b]), step);
          const __m512 before = first ? _mm512_setzero_ps() : _mm512_load_ps(&scores[r][t]);
          _mm512_store_ps(&scores[r][t], _mm512_fmadd_ps(_mm512_load_ps(alpha + t), dot, before));
        }
      }
    }
  }

  // A row of weights as 128 * high + low, in units of `step`.
  struct IntWeights {
    alignas(64) int8_t high[kTokens], low[kTokens];
    float step;
    int sum;

    void round(const float* weights, int num_tokens) {
      // As bit patterns, NaN is the largest magnitude, so it reaches `step` and the output.
      __m512i largest = _mm512_setzero_si512();
      for (int t = 0; t < num_tokens; t += kLanes) {
        const __m512 magnitude = _mm512_abs_ps(_mm512_load_ps(weights + t));
        largest = _mm512_max_epi32(largest, _mm512_castps_si512(magnitude));
      }
      const float max = float_of(_mm512_reduce_max_epi32(largest));
      step = max / 16383;
      const __m512 inverse = _mm512_set1_ps(max > 0 ? 16383 / max : 0);
      __m512i total = _mm512_setzero_si512();
      for (int t = 0; t < num_tokens; t += kLanes) {
        const __m512i x = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(weights + t), inverse));
        total = _mm512_add_epi32(total, x);
        _mm_store_si128(reinterpret_cast<__m128i*>(high + t),
                        _mm512_cvtepi32_epi8(_mm512_srai_epi32(x, 7)));
        _mm_store_si128(reinterpret_cast<__m128i*>(low + t),
                        _mm512_cvtepi32_epi8(_mm512_and_si512(x, _mm512_set1_epi32(127))));
      }
      sum = _mm512_reduce_add_epi32(total);
    }
  };

  template <int kRows>
  void add_rows(const float (*weights)[kTokens], float* const* out) const {
    using Book = IntCodebook<kGroup>;
    IntWeights w[kRows];
    for (int r = 0; r < kRows; ++r) w[r].round(weights[r], num_quads_ * 4);
    constexpr int kColumns = 2;  // accumulators: rows x columns x (high, low)
    for (int c = 0; c < kGroup / 16; c += kColumns) {
      __m512i high[kRows][kColumns] = {}, low[kRows][kColumns] = {};
      for (int quad = 0; quad < num_quads_; ++quad) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512i upper = broadcast(w[r].high + 4 * quad),
                        lower = broadcast(w[r].low + 4 * quad);
#pragma GCC unroll 2
          for (int i = 0; i < kColumns; ++i) {
            high[r][i] = _mm512_dpbusd_epi32(high[r][i], values_[quad][c + i], upper);
            low[r][i] = _mm512_dpbusd_epi32(low[r][i], values_[quad][c + i], lower);
          }
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const __m512i offset = _mm512_set1_epi32(Book::kOuter * w[r].sum);
        const __m512 step = _mm512_set1_ps(w[r].step * Book::kStep);
        for (int i = 0; i < kColumns; ++i) {
          // Levels were shifted by kOuter and halved to fit a byte.
          const __m512i sum = _mm512_sub_epi32(
              _mm512_add_epi32(_mm512_slli_epi32(high[r][i], 8), _mm512_slli_epi32(low[r][i], 1)),
              offset);
          float* x = out[r] + (c + i) * 16;
          _mm512_storeu_ps(x, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), step, _mm512_loadu_ps(x)));
        }
      }
    }
  }

  static __m512i broadcast(const int8_t* x) {
    int32_t word;
    std::memcpy(&word, x, sizeof word);
    return _mm512_set1_epi32(word);
  }

  int num_blocks_, num_quads_;
  __m512i keys_[kPairs][kBlocks];             // codes of 32 tokens, 16 bits each
  __m512i values_[kTokens / 4][kGroup / 16];  // centroids of four tokens of sixteen coordinates
};

}  // namespace tq::cpu
