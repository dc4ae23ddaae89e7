// What a warp has summed over its tokens, and the merge of the warps of a CTA.
#pragma once

#include <cfloat>

#include "cuda/codes.cuh"
#include "cuda/decode_query.cuh"
#include "cuda/decode_traits.cuh"
#include "cuda/ptx.cuh"

namespace tq::cuda {

// Weights p beta / max(beta) are at most 2^8; this brings them to the top of float16.
inline constexpr float kWeightScale = 128.0f;

// State of one warp's stream. Lane 4 g + t: scores of tokens g and g + 8 and rows 4 i + t.
template <typename Traits>
struct DecodeState {
  float max[Traits::kKeyTiles];                              // log2, of rows 4 i + t
  float sum[Traits::kKeyTiles];                              // of this lane's tokens
  float value_scale;                                         // what weights were divided by
  float out[Traits::kNumGroups][Traits::kValueWords][4][4];  // accumulators, columns = rows

  __device__ DecodeState() : value_scale(1e-30f) {
    for (int i = 0; i < Traits::kKeyTiles; ++i) max[i] = -1e30f, sum[i] = 0.0f;
    for (auto& group : out) {
      for (auto& word : group) {
        for (auto& tile : word) {
          for (float& x : tile) x = 0.0f;
        }
      }
    }
  }
};

// Merge the warps of the CTA and write the partial result of every row.
template <typename Traits>
__device__ inline void write_partial(const DecodeParams& p, const RowRange& rows, int split,
                                     const DecodeState<Traits>& state,
                                     typename Traits::Shared* shared) {
  constexpr int kGroup = Traits::kGroup;
  typename Traits::Merge& merge = shared->merge;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g8 = lane / 4, t = lane % 4;
  __syncthreads();  // every warp is done with its ring
#pragma unroll
  for (int i = 0; i < Traits::kKeyTiles; ++i) {
    float sum = state.sum[i];
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
    if (g8 == 0) merge.max[warp][4 * i + t] = state.max[i], merge.sum[warp][4 * i + t] = sum;
  }
  const float unit = state.value_scale * (HalfBook<kGroup>::kUnit / kWeightScale);
  if (2 * t < Traits::kRows) {
#pragma unroll
    for (int i = 0; i < Traits::kNumGroups * Traits::kValueWords * 4; ++i) {
      const int g = i / (Traits::kValueWords * 4), w = i / 4 % Traits::kValueWords, tile = i % 4;
      const int first = g * kGroup + g8 * (kGroup / 8) + 8 * w + 4 * (tile >> 1) + (tile & 1);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        merge.out[warp][2 * t + e % 2][first + e / 2 * 2] = state.out[g][w][tile][e] * unit;
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < Traits::kRows * Traits::kHeadDim; i += Traits::kThreads) {
    const int row = i / Traits::kHeadDim, coordinate = i % Traits::kHeadDim;
    if (!rows.contains(row)) break;
    float max = -FLT_MAX, sum = 0.0f, out = 0.0f;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) max = fmaxf(max, merge.max[w][row]);
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) {
      const float weight = exp2f(merge.max[w][row] - max);
      sum += weight * merge.sum[w][row];
      out += weight * merge.out[w][row][coordinate];
    }
    const int64_t at =
        split * p.partials.num_rows + rows.token(row) * p.attention.num_heads + rows.head(row);
    const bool sees_nothing = sum == 0.0f;
    p.partials.out[at * Traits::kHeadDim + coordinate] = sees_nothing ? 0.0f : out / sum;
    if (coordinate == 0) {
      float bias = 0.0f;
      for (int g = 0; g < Traits::kNumGroups; ++g) bias += shared->query.bias[row][g];
      constexpr float kLn2 = 0.693147180559945f;
      p.partials.lse[at] = sees_nothing ? -INFINITY : (max + log2f(sum) + bias) * kLn2;
    }
  }
}

}  // namespace tq::cuda
