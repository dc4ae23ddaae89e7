// Scores of a unit of 16 tokens: matrix products of its keys, as integers, with the queries.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/decode_query.cuh"
#include "cuda/decode_traits.cuh"

namespace tq::cuda {

// Scores, less what all keys of a span have, and value scales of one unit.
template <typename Traits>
struct UnitScores {
  float score[Traits::kKeyTiles][2];  // log2, tokens g and g + 8
  float beta[Traits::kNumGroups][2];  // of the same tokens
};

// What makes the integer products of this lane's rows, 4 i + t, scores.
template <typename Traits>
struct ScoreFactors {
  float unit[Traits::kKeyTiles][Traits::kNumGroups];
  float base[Traits::kKeyTiles][Traits::kNumGroups];
  float far[Traits::kKeyTiles][Traits::kNumGroups];   // for keys that start at the sink
  float near[Traits::kKeyTiles];                      // for those at the center of a span
  float sink[Traits::kKeyTiles][Traits::kNumGroups];  // for those at the sink, less that

  __device__ explicit ScoreFactors(const typename Traits::Shared& shared) {
#pragma unroll
    for (int i = 0; i < Traits::kKeyTiles; ++i) {
      const int row = 4 * i + (threadIdx.x & 3);
#pragma unroll
      for (int g = 0; g < Traits::kNumGroups; ++g) {
        unit[i][g] = shared.query.unit[row][g];
        base[i][g] = shared.query.base[row][g];
        far[i][g] = shared.sink[row][g];
      }
    }
  }

  __device__ void enter(const typename Traits::OriginScores& span) {
#pragma unroll
    for (int i = 0; i < Traits::kKeyTiles; ++i) {
      const int row = 4 * i + (threadIdx.x & 3);
#pragma unroll
      for (int g = 0; g < Traits::kNumGroups; ++g) {
        near[i] = g == 0 ? span[row][g] : near[i] + span[row][g];
        sink[i][g] = far[i][g] - span[row][g];
      }
    }
  }
};

// Operands of the keys' products: registers where they fit, else read again from shared memory.
template <typename Traits>
class QueryOperands {
 public:
  static constexpr bool kInRegisters =
      Traits::kNumGroups * Traits::kKeyTiles * Traits::kProducts <= 8;
  static constexpr int kCount = kInRegisters ? Traits::kNumGroups * Traits::kProducts * 2 : 1;

  __device__ explicit QueryOperands(const typename Traits::Query& query) : query_(query) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int g = i / (Traits::kProducts * 2), j = i / 2 % Traits::kProducts;
#pragma unroll
        for (int tile = 0; tile < Traits::kKeyTiles; ++tile) {
          index_[i][tile] = read(query_.index[g][j][i % 2], tile);
          sign_[i][tile] = read(query_.sign[g][j][i % 2], tile);
        }
      }
    }
  }
  __device__ uint32_t index(int g, int j, int half, int tile) const {
    if constexpr (kInRegisters) return index_[(g * Traits::kProducts + j) * 2 + half][tile];
    return read(query_.index[g][j][half], tile);
  }
  __device__ uint32_t sign(int g, int j, int half, int tile) const {
    if constexpr (kInRegisters) return sign_[(g * Traits::kProducts + j) * 2 + half][tile];
    return read(query_.sign[g][j][half], tile);
  }

 private:
  using Columns = const uint8_t (&)[Traits::kKeyTiles * 8][4][4];
  __device__ static uint32_t read(Columns columns, int tile) {
    const int lane = threadIdx.x & 31;
    return *reinterpret_cast<const uint32_t*>(columns[tile * 8 + lane / 4][lane % 4]);
  }

  const typename Traits::Query& query_;
  uint32_t index_[kCount][Traits::kKeyTiles], sign_[kCount][Traits::kKeyTiles];
};

// Codes of one token's quarter of a key group: index words, and sign words as expand_signs wants
// them.
template <typename Traits>
struct KeyWords {
  static constexpr int kIndexWords = Traits::kGroup / 64;
  uint32_t index[kIndexWords];
  uint32_t sign[kIndexWords];  // expanded twice: as it is, and with the low half bytes moved up

  __device__ KeyWords(const uint8_t* unit, int g, int token) {
    const int t = threadIdx.x & 3;
    const uint8_t* codes = unit + token * (Traits::kHeadDim / 4) + g * (Traits::kGroup / 4);
    const uint8_t* signs =
        unit + Traits::kKeySignAt + token * (Traits::kHeadDim / 8) + g * (Traits::kGroup / 8);
    if constexpr (Traits::kGroup == 128) {
      const uint2 words = reinterpret_cast<const uint2*>(codes)[t];
      index[0] = words.x, index[1] = words.y;
      sign[0] = reinterpret_cast<const uint32_t*>(signs)[t];
      sign[1] = sign[0] << 4;
    } else {
      index[0] = reinterpret_cast<const uint32_t*>(codes)[t];
      const uint32_t word = reinterpret_cast<const uint16_t*>(signs)[t];
      sign[0] = __byte_perm(word, word << 4, 0x5410);
    }
  }
};

__device__ inline float read_scale(const uint8_t* scales, int token) {
  return __half2float(reinterpret_cast<const __half*>(scales)[token]);
}

// One group's part of the score of a token, in half h of the products with its operands. scale: of
// the key, negative where it starts at the sink. base: score of operands that are all 0.
template <typename Traits>
__device__ inline float score_of(const int32_t (&product)[4], int h, float scale, float base,
                                 int tile, int g, const ScoreFactors<Traits>& factors) {
  const auto sum = static_cast<float>(product[2 * h] * 128 + product[2 * h + 1]);
  const float origin = signbit(scale) ? factors.sink[tile][g] : 0.0f;
  return fmaf(fabsf(scale), fmaf(sum, factors.unit[tile][g], base), origin);
}

// Score a unit by its codes.
template <typename Traits>
__device__ inline void score_unit(uint32_t table, const uint8_t* unit,
                                  const QueryOperands<Traits>& query,
                                  const ScoreFactors<Traits>& factors, UnitScores<Traits>* out) {
  const int g8 = (threadIdx.x & 31) / 4;
#pragma unroll
  for (int g = 0; g < Traits::kNumGroups; ++g) {
    const KeyWords<Traits> low(unit, g, g8), high(unit, g, g8 + 8);
    int32_t product[Traits::kKeyTiles][4] = {};
#pragma unroll
    for (int w = 0; w < KeyWords<Traits>::kIndexWords; ++w) {
      uint32_t a[4], b[4], c[4], d[4];
      expand_index(table, low.index[w], a);
      expand_index(table, high.index[w], b);
      expand_signs(low.sign[w], c);
      expand_signs(high.sign[w], d);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int j = 2 * w + i;
#pragma unroll
        for (int tile = 0; tile < Traits::kKeyTiles; ++tile) {
          mma_int8(product[tile], a[2 * i], b[2 * i], a[2 * i + 1], b[2 * i + 1],
                   query.index(g, j, 0, tile), query.index(g, j, 1, tile));
          mma_int8(product[tile], c[2 * i], d[2 * i], c[2 * i + 1], d[2 * i + 1],
                   query.sign(g, j, 0, tile), query.sign(g, j, 1, tile));
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = g8 + 8 * h;
      const float alpha =
          read_scale(unit + Traits::kKeyScaleAt + g * Traits::kScaleRowBytes, token);
      out->beta[g][h] =
          read_scale(unit + Traits::kValueScaleAt + g * Traits::kScaleRowBytes, token);
#pragma unroll
      for (int tile = 0; tile < Traits::kKeyTiles; ++tile) {
        const float score =
            score_of<Traits>(product[tile], h, alpha, factors.base[tile][g], tile, g, factors);
        out->score[tile][h] = g == 0 ? score : out->score[tile][h] + score;
      }
    }
  }
}

// Score a unit by its 8-bit copies.
template <typename Traits>
__device__ inline void score_copies(const uint8_t* copies, const QueryOperands<Traits>& query,
                                    const ScoreFactors<Traits>& factors, UnitScores<Traits>* out) {
  constexpr int kGroup = Traits::kGroup;
  constexpr CopyOffsets kAt = SlotLayout{Traits::kHeadDim}.copy_offsets();
  const int lane = threadIdx.x & 31, g8 = lane / 4, t = lane % 4;
#pragma unroll
  for (int g = 0; g < Traits::kNumGroups; ++g) {
    int32_t product[Traits::kKeyTiles][4] = {};
    const uint8_t* low = copies + kAt.key + g8 * Traits::kHeadDim + g * kGroup + t * (kGroup / 4);
    const uint8_t* high = low + 8 * Traits::kHeadDim;
#pragma unroll
    for (int w = 0; w < kGroup / 64; ++w) {
      uint32_t a[4], b[4];
      order_copies(reinterpret_cast<const uint4*>(low)[w], a);
      order_copies(reinterpret_cast<const uint4*>(high)[w], b);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int tile = 0; tile < Traits::kKeyTiles; ++tile) {
          mma_int8(product[tile], a[2 * i], b[2 * i], a[2 * i + 1], b[2 * i + 1],
                   query.index(g, 2 * w + i, 0, tile), query.index(g, 2 * w + i, 1, tile));
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = g * kUnitTokens + g8 + 8 * h;
      // Queries and sums are in units of the codes' integers.
      constexpr float kPerKey = 1.0f / IntegerBook<kGroup>::kUnit;
      constexpr float kPerValue = 1.0f / HalfBook<kGroup>::kUnit;
      const float scale = read_scale(copies + kAt.key_scale, token) * kPerKey;
      out->beta[g][h] = read_scale(copies + kAt.value_scale, token) * kPerValue;
#pragma unroll
      for (int tile = 0; tile < Traits::kKeyTiles; ++tile) {
        const float score = score_of<Traits>(product[tile], h, scale, 0.0f, tile, g, factors);
        out->score[tile][h] = g == 0 ? score : out->score[tile][h] + score;
      }
    }
  }
}

}  // namespace tq::cuda
