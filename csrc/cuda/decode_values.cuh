// Weighted sums of values: scores become weights, values float16 operands.
#pragma once

#include <cfloat>

#include "cuda/codes.cuh"
#include "cuda/decode_merge.cuh"
#include "cuda/decode_scores.cuh"
#include "cuda/decode_traits.cuh"

namespace tq::cuda {

// The running maximum may lag by this much (log2), so that most batches need no rescaling.
inline constexpr float kMaxLag = 8.0f;
// Room for growth of beta before it forces a rescaling.
inline constexpr float kValueHeadroom = 4.0f;

// Raise the maximum and the value scale to what the batch needs, and shrink what was summed.
template <typename Traits>
__device__ inline void rescale(const float (&score_max)[Traits::kKeyTiles], float beta_max,
                               DecodeState<Traits>& state) {
  const int lane = threadIdx.x & 31, t = lane % 4;
  float shrink[Traits::kKeyTiles];
#pragma unroll
  for (int i = 0; i < Traits::kKeyTiles; ++i) {
    float max = score_max[i];
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, mask));
    }
    max = fmaxf(max, state.max[i]);
    shrink[i] = exp2_approx(state.max[i] - max);
    state.max[i] = max;
    state.sum[i] *= shrink[i];
  }
  float factor = 1.0f;
  beta_max = warp_max(beta_max);
  if (beta_max > state.value_scale) {
    factor = __fdividef(state.value_scale, beta_max * kValueHeadroom);
    state.value_scale = beta_max * kValueHeadroom;
  }
  // Accumulator columns 2 t and 2 t + 1 are rows of that number; row r is in lane r % 4, tile r
  // / 4.
  const int source = 2 * t % 4;
  float even = __shfl_sync(kAllLanes, shrink[0], source);
  float odd = __shfl_sync(kAllLanes, shrink[0], source + 1);
  if constexpr (Traits::kKeyTiles == 2) {
    const float even1 = __shfl_sync(kAllLanes, shrink[1], source);
    const float odd1 = __shfl_sync(kAllLanes, shrink[1], source + 1);
    if (t >= 2) even = even1, odd = odd1;
  }
  even *= factor, odd *= factor;
#pragma unroll
  for (auto& group : state.out) {
#pragma unroll
    for (auto& word : group) {
#pragma unroll
      for (auto& tile : word) tile[0] *= even, tile[1] *= odd, tile[2] *= even, tile[3] *= odd;
    }
  }
}

// Value codes of one group, of this lane's tokens t, t + 4, t + 8, t + 12 and coordinates from g8 *
// kGroup / 8 on, as operands.
template <typename Traits>
struct CodedValues {
  uint32_t table, words[4];

  __device__ CodedValues(uint32_t table_, const uint8_t* unit, int g) : table(table_) {
    const int lane = threadIdx.x & 31, g8 = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* codes = unit + Traits::kValueIndexAt + (t + 4 * i) * (Traits::kHeadDim / 4) +
                             g * (Traits::kGroup / 4);
      words[i] = Traits::kGroup == 128 ? reinterpret_cast<const uint32_t*>(codes)[g8]
                                       : reinterpret_cast<const uint16_t*>(codes)[g8];
    }
  }
  // Coordinates 8 w to 8 w + 7: x of tokens t and t + 8, y of tokens t + 4 and t + 12.
  __device__ void expand(int w, uint32_t (&x)[8], uint32_t (&y)[8]) const {
    const uint32_t selector = w == 0 ? 0x5140 : 0x7362;
    expand_values(table, __byte_perm(words[0], words[2], selector), x);
    expand_values(table, __byte_perm(words[1], words[3], selector), y);
  }
};

// The same of 8-bit copies.
template <typename Traits>
struct CopiedValues {
  uint2 words[4][Traits::kValueWords];

  __device__ CopiedValues(const uint8_t* copies, int g) {
    const int lane = threadIdx.x & 31, g8 = lane / 4, t = lane % 4;
    constexpr CopyOffsets kAt = SlotLayout{Traits::kHeadDim}.copy_offsets();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* from = copies + kAt.value + (t + 4 * i) * Traits::kHeadDim +
                            g * Traits::kGroup + g8 * (Traits::kGroup / 8);
#pragma unroll
      for (int w = 0; w < Traits::kValueWords; ++w) {
        words[i][w] = reinterpret_cast<const uint2*>(from)[w];
      }
    }
  }
  __device__ void expand(int w, uint32_t (&x)[8], uint32_t (&y)[8]) const {
    expand_copies(words[0][w], words[2][w], x);
    expand_copies(words[1][w], words[3][w], y);
  }
};

// Add the values of one unit, weighted. p: of this lane's rows and tokens g, g + 8. values(g): the
// operands of a group.
template <typename Traits, typename Values>
__device__ inline void add_values(const Values& values, const float (&p)[Traits::kKeyTiles][2],
                                  const float (&beta)[Traits::kNumGroups][2], float inverse,
                                  DecodeState<Traits>& state) {
  const int lane = threadIdx.x & 31, g8 = lane / 4, t = lane % 4;
  // Column g of the weights is row g; its k are tokens t, t + 8, t + 4, t + 12.
  const int source = 4 * t + g8 % 4;
#pragma unroll
  for (int g = 0; g < Traits::kNumGroups; ++g) {
    const float scale0 = beta[g][0] * inverse, scale1 = beta[g][1] * inverse;
    uint32_t weights = pack_half2(p[0][0] * scale0, p[0][1] * scale1);
    uint32_t b0 = __shfl_sync(kAllLanes, weights, source);
    uint32_t b1 = __shfl_sync(kAllLanes, weights, source + 16);
    if constexpr (Traits::kKeyTiles == 2) {
      weights = pack_half2(p[1][0] * scale0, p[1][1] * scale1);
      const uint32_t upper0 = __shfl_sync(kAllLanes, weights, source);
      const uint32_t upper1 = __shfl_sync(kAllLanes, weights, source + 16);
      if (g8 >= 4) b0 = upper0, b1 = upper1;
    }
    const auto operands = values(g);
#pragma unroll
    for (int w = 0; w < Traits::kValueWords; ++w) {
      uint32_t x[8], y[8];
      operands.expand(w, x, y);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = 4 * (i >> 1) + (i & 1);
        mma_half(state.out[g][w][i], x[c], x[c + 2], y[c], y[c + 2], b0, b1);
      }
    }
  }
}

// Add one or more units: turn their scores, and value scales, into weights, and add what
// values(k, g) gives. Shrinks first what was summed, where scores or scales have outgrown it.
template <typename Traits, int kUnits, typename Values>
__device__ inline void add_units(const UnitScores<Traits> (&units)[kUnits], const Values& values,
                                 const float (&near)[Traits::kKeyTiles],
                                 DecodeState<Traits>& state) {
  float score_max[Traits::kKeyTiles], beta_max = 0.0f;
#pragma unroll
  for (int i = 0; i < Traits::kKeyTiles; ++i) score_max[i] = -FLT_MAX;
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int g = 0; g < Traits::kNumGroups; ++g) beta_max = fmaxf(beta_max, units[k].beta[g][h]);
#pragma unroll
      for (int i = 0; i < Traits::kKeyTiles; ++i) {
        score_max[i] = fmaxf(score_max[i], units[k].score[i][h]);
      }
    }
  }
  bool grows = beta_max > state.value_scale;
  float max[Traits::kKeyTiles];  // less what the scores lack
#pragma unroll
  for (int i = 0; i < Traits::kKeyTiles; ++i) {
    max[i] = state.max[i] - near[i];
    grows |= score_max[i] > max[i] + kMaxLag;
  }
  if (__any_sync(kAllLanes, grows)) {
#pragma unroll
    for (int i = 0; i < Traits::kKeyTiles; ++i) score_max[i] += near[i];
    rescale<Traits>(score_max, beta_max, state);
#pragma unroll
    for (int i = 0; i < Traits::kKeyTiles; ++i) max[i] = state.max[i] - near[i];
  }

  const float inverse = __fdividef(kWeightScale, state.value_scale);
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    float p[Traits::kKeyTiles][2];
#pragma unroll
    for (int i = 0; i < Traits::kKeyTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        p[i][h] = exp2_approx(units[k].score[i][h] - max[i]);
        state.sum[i] += p[i][h];
      }
    }
    add_values<Traits>([&](int g) { return values(k, g); }, p, units[k].beta, inverse, state);
  }
}

}  // namespace tq::cuda
