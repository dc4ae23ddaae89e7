// What a warp has summed over its tokens, the merge of the warps of a CTA, and that of the splits.
#pragma once

#include <cfloat>

#include "cuda/codes.cuh"
#include "cuda/decode_query.cuh"
#include "cuda/decode_traits.cuh"
#include "cuda/ptx.cuh"
#include "cuda/warp.cuh"

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

// Where the partial results of a tile's rows are: in global memory, or, of the only split, in
// shared memory.
template <typename Traits>
struct TilePartials {
  const DecodeParams& p;
  const RowRange& rows;
  typename Traits::Combine* only;  // null where there are several splits

  __device__ int64_t at(int split, int row) const {
    return split * p.partials.num_rows + rows.token(row) * p.attention.num_heads + rows.head(row);
  }
  __device__ float* out(int split, int row) const {
    return only ? only->only_out[row] : p.partials.out + at(split, row) * Traits::kHeadDim;
  }
  __device__ float* lse(int split, int row) const {
    return only ? only->only_lse + row : p.partials.lse + at(split, row);
  }
};

// The largest of one number of every warp.
template <typename Traits>
__device__ inline float max_of_warps(const float (&of_warp)[Traits::kWarps]) {
  float max = of_warp[0];
#pragma unroll
  for (int w = 1; w < Traits::kWarps; ++w) max = fmaxf(max, of_warp[w]);
  return max;
}

// Merge the warps of the CTA and write the partial result of every row.
template <typename Traits>
__device__ inline void write_partial(const TilePartials<Traits>& partials, int split,
                                     const DecodeState<Traits>& state,
                                     typename Traits::Shared* shared) {
  constexpr int kGroup = Traits::kGroup;
  typename Traits::Merge& merge = shared->merge;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g8 = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < Traits::kKeyTiles; ++i) {
    float sum = state.sum[i];
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
    if (g8 == 0) {
      shared->max[4 * i + t][warp] = state.max[i];
      shared->sum[4 * i + t][warp] = sum;
    }
  }
  __syncthreads();  // every warp is done with its ring, too

  // This lane has rows 2 t and 2 t + 1, and of each group kGroup / 8 coordinates in a row.
  if (2 * t < Traits::kRows) {
    const float unit = state.value_scale * (HalfBook<kGroup>::kUnit / kWeightScale);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 2 * t + e;
      const float max = max_of_warps<Traits>(shared->max[row]);
      const float weight = exp2_approx(shared->max[row][warp] - max);
      if (g8 == 0) merge.sum[row][warp] = weight * shared->sum[row][warp];
#pragma unroll
      for (int g = 0; g < Traits::kNumGroups; ++g) {
        auto* to = reinterpret_cast<float4*>(merge.row(warp, row) + g * kGroup + g8 * (kGroup / 8));
#pragma unroll
        for (int i = 0; i < Traits::kValueWords * 2; ++i) {
          const auto& even = state.out[g][i / 2][i % 2 * 2];
          const auto& odd = state.out[g][i / 2][i % 2 * 2 + 1];
          const float scale = unit * weight;
          to[i] = {even[e] * scale, odd[e] * scale, even[e + 2] * scale, odd[e + 2] * scale};
        }
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < Traits::kRows * Traits::kHeadDim; i += Traits::kThreads) {
    const int row = i / Traits::kHeadDim, coordinate = i % Traits::kHeadDim;
    if (!partials.rows.contains(row)) break;
    float sum = 0.0f, out = 0.0f;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) {
      sum += merge.sum[row][w];
      out += merge.row(w, row)[coordinate];
    }
    const bool sees_nothing = sum == 0.0f;
    partials.out(split, row)[coordinate] = sees_nothing ? 0.0f : out / sum;
    if (coordinate == 0) {
      float bias = 0.0f;
      for (int g = 0; g < Traits::kNumGroups; ++g) bias += shared->query.bias[row][g];
      constexpr float kLn2 = 0.693147180559945f;
      const float max = max_of_warps<Traits>(shared->max[row]);
      *partials.lse(split, row) = sees_nothing ? -INFINITY : (max + log2f(sum) + bias) * kLn2;
    }
  }
}

// Whether this CTA is the last of `num_splits` to have written its partial results; if so, all of
// them can be read.
__device__ inline bool is_last(uint32_t* ticket, int num_splits, bool* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    // After the barrier, so that it releases all threads' writes.
    *shared = add_acq_rel(ticket, 1) == static_cast<uint32_t>(num_splits) - 1;
    if (*shared) *ticket = 0;  // for the next launch
  }
  __syncthreads();
  return *shared;
}

// Merge the splits of a tile's rows, rotate the values back, write output and log-sum-exp.
// out = (H D3)^T sum_s w_s out_s,   w_s = exp(lse_s - lse),   lse = log sum_s exp(lse_s)
// The splits are added in an order that does not depend on which CTA was last.
template <typename Traits>
__device__ inline void combine_splits(const TilePartials<Traits>& partials, int num_splits,
                                      typename Traits::Shared* shared) {
  constexpr int kGroup = Traits::kGroup, kCount = kPerLane<kGroup>;
  constexpr int kStep = Traits::kWarpsPerRow, kRowsAtOnce = Traits::kWarps / kStep;
  typename Traits::Combine& scratch = shared->combine;
  const AttentionParams& a = partials.p.attention;
  const RowRange& rows = partials.rows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  for (int first = 0; first < Traits::kRows; first += kRowsAtOnce) {
    const int row = first + warp / kStep, part = warp % kStep;
    const bool mine = row < Traits::kRows && rows.contains(row);

    // 1. The largest log-sum-exp; every warp finds it for itself.
    float max = -INFINITY, sum = 0.0f, out[Traits::kNumGroups][kCount] = {};
    if (mine) {
      for (int s = lane; s < num_splits; s += 32) {
        max = fmaxf(max, load_relaxed(partials.lse(s, row)));
      }
    }
    max = warp_max(max);
    // A row that sees nothing: weights exp(-inf - 0) = 0 and not exp(-inf + inf).
    const float base = max == -INFINITY ? 0.0f : max;

    // 2. Sum this warp's splits.
    if (mine) {
#pragma unroll 8  // loads in flight
      for (int s = part; s < num_splits; s += kStep) {
        const float weight = __expf(load_relaxed(partials.lse(s, row)) - base);
        const float* from = partials.out(s, row) + lane * kCount;
        sum += weight;
#pragma unroll
        for (int g = 0; g < Traits::kNumGroups; ++g) {
          float x[kCount];
          load_relaxed(from + g * kGroup, x);
#pragma unroll
          for (int e = 0; e < kCount; ++e) out[g][e] += weight * x[e];
        }
      }
    }

    // 3. Sum the warps of the row, in its first one.
    if (part != 0) {
#pragma unroll
      for (int g = 0; g < Traits::kNumGroups; ++g) {
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          scratch.out[warp][g * kGroup + lane * kCount + e] = out[g][e];
        }
      }
      if (lane == 0) scratch.sum[warp] = sum;
    }
    __syncthreads();
    if (mine && part == 0) {
#pragma unroll
      for (int w = 1; w < kStep; ++w) {
        sum += scratch.sum[warp + w];
#pragma unroll
        for (int g = 0; g < Traits::kNumGroups; ++g) {
#pragma unroll
          for (int e = 0; e < kCount; ++e) {
            out[g][e] += scratch.out[warp + w][g * kGroup + lane * kCount + e];
          }
        }
      }

      // 4. Rotate back.
      const float scale = sum == 0.0f ? 0.0f : 1.0f / (sum * Codebook<kGroup>::kRoot);
      const int64_t token = rows.token(row);
      const int head = rows.head(row);
      float sign[kCount];
      lane_signs<kGroup, kValueSigns>(sign);
#pragma unroll
      for (int g = 0; g < Traits::kNumGroups; ++g) {
        warp_hadamard<kGroup>(out[g]);
#pragma unroll
        for (int e = 0; e < kCount; ++e) out[g][e] *= scale * sign[e];
        write_row(a.out, token, head, g * kGroup + lane * kCount, out[g]);
      }
      if (lane == 0) a.lse[head * a.lse_stride + token] = sum == 0.0f ? -INFINITY : max + logf(sum);
    }
    __syncthreads();  // shared memory is free for the next rows
  }
}

}  // namespace tq::cuda
