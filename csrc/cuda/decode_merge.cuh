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
  const int thread = read_thread();
  const int warp = thread / 32, lane = thread & 31, g8 = lane / 4, t = lane % 4;
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
  for (int i = thread; i < Traits::kRows * Traits::kHeadDim; i += Traits::kThreads) {
    const int row = i / Traits::kHeadDim, coordinate = i % Traits::kHeadDim;
    if (!partials.rows.contains(row)) break;
    float sum = 0.0f, out = 0.0f;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) {
      sum += merge.sum[row][w];
      out += merge.row(w, row)[coordinate];
    }
    const bool sees_nothing = sum == 0.0f;
    partials.out(split, row)[coordinate] = sees_nothing ? 0.0f : __fdividef(out, sum);
    if (coordinate == 0) {
      constexpr float kLn2 = 0.693147180559945f;
      const float max = max_of_warps<Traits>(shared->max[row]);
      *partials.lse(split, row) = sees_nothing ? -INFINITY : (max + log2f(sum)) * kLn2;
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

// Results of a row merged by their log-sum-exp, this lane's coordinates of it.
template <typename Traits>
struct MergedResults {
  static constexpr int kCount = kPerLane<Traits::kGroup>;
  float max = -INFINITY;  // log-sum-exp that weights are measured from
  float sum = 0.0f;       // of weights
  float out[Traits::kNumGroups][kCount] = {};

  // 0 where nothing is seen, so that weights are exp(-inf) and not exp(-inf + inf).
  __device__ float base() const { return max == -INFINITY ? 0.0f : max; }

  // Make room for a log-sum-exp.
  __device__ void raise(float lse) {
    const float before = max;
    max = fmaxf(max, lse);
    const float shrink = __expf(before - base());
    sum *= shrink;
#pragma unroll
    for (auto& group : out) {
#pragma unroll
      for (float& x : group) x *= shrink;
    }
  }

  // Add a result with a log-sum-exp of at most `max`, or several that have the sum `count`.
  __device__ void add(float lse, float count, const float (&x)[Traits::kNumGroups][kCount]) {
    const float weight = __expf(lse - base());
    sum += weight * count;
#pragma unroll
    for (int g = 0; g < Traits::kNumGroups; ++g) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) out[g][e] += weight * x[g][e];
    }
  }
};

// Add kSplits splits of a row, first, first + step, ..., as far as there are so many. Their loads
// are in flight together.
template <typename Traits, int kSplits>
__device__ inline void add_splits(const TilePartials<Traits>& partials, int row, int first,
                                  int step, int num_splits, MergedResults<Traits>& merged) {
  constexpr int kCount = kPerLane<Traits::kGroup>;
  float lse[kSplits], x[kSplits][Traits::kNumGroups][kCount];
#pragma unroll
  for (int i = 0; i < kSplits; ++i) {
    const int split = first + i * step, there = min(split, num_splits - 1);
    const float* out = partials.out(there, row) + (threadIdx.x & 31) * kCount;
    lse[i] = load_relaxed(partials.lse(there, row));
#pragma unroll
    for (int g = 0; g < Traits::kNumGroups; ++g) load_relaxed(out + g * Traits::kGroup, x[i][g]);
    if (split != there) lse[i] = -INFINITY;
  }
  float max = lse[0];
#pragma unroll
  for (int i = 1; i < kSplits; ++i) max = fmaxf(max, lse[i]);
  merged.raise(max);
#pragma unroll
  for (int i = 0; i < kSplits; ++i) merged.add(lse[i], 1.0f, x[i]);
}

// Merge the splits of a tile's rows, rotate the values back, write output and log-sum-exp.
// out = (H D3)^T sum_s w_s out_s,   w_s = exp(lse_s - lse),   lse = log sum_s exp(lse_s)
// The splits are added in an order that does not depend on which CTA was last.
template <typename Traits>
__device__ inline void combine_splits(const TilePartials<Traits>& partials, int num_splits,
                                      typename Traits::Shared* shared) {
  constexpr int kGroup = Traits::kGroup, kCount = kPerLane<kGroup>;
  // Splits of one warp whose loads are in flight together; a last one alone is not worth as many.
  constexpr int kAtOnce = Traits::kWarps >= 4 * Traits::kRows || Traits::kHeadDim > 128 ? 4 : 8;
  typename Traits::Combine& scratch = shared->combine;
  const AttentionParams& a = partials.p.attention;
  const RowRange& rows = partials.rows;
  const Divisor& warps_per_row = partials.p.warps_per_row;
  const int step = warps_per_row.value(), rows_at_once = warps_per_row.divide(Traits::kWarps);
  const int thread = read_thread(), warp = thread / 32, lane = thread & 31;
  const int row_of_warp = warps_per_row.divide(warp), part = warp - row_of_warp * step;
  for (int first = 0; first < Traits::kRows && rows.contains(first); first += rows_at_once) {
    const int row = first + row_of_warp;
    const bool mine = row_of_warp < rows_at_once && row < Traits::kRows && rows.contains(row);

    // 1. Every warp merges some splits.
    MergedResults<Traits> merged;
    for (int split = part; mine && split < num_splits; split += kAtOnce * step) {
      if (split + step < num_splits) {
        add_splits<Traits, kAtOnce>(partials, row, split, step, num_splits, merged);
      } else {
        add_splits<Traits, 1>(partials, row, split, step, num_splits, merged);
      }
    }
    if (part != 0) {
#pragma unroll
      for (int g = 0; g < Traits::kNumGroups; ++g) {
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          scratch.out[warp][g * kGroup + lane * kCount + e] = merged.out[g][e];
        }
      }
      if (lane == 0) scratch.max[warp] = merged.max, scratch.sum[warp] = merged.sum;
    }
    __syncthreads();

    // 2. The first warp of a row merges the others'.
    if (mine && part == 0) {
      float max = merged.max;
      for (int w = warp + 1; w < warp + step; ++w) max = fmaxf(max, scratch.max[w]);
      merged.raise(max);
      for (int w = warp + 1; w < warp + step; ++w) {
        float x[Traits::kNumGroups][kCount];
#pragma unroll
        for (int g = 0; g < Traits::kNumGroups; ++g) {
#pragma unroll
          for (int e = 0; e < kCount; ++e) {
            x[g][e] = scratch.out[w][g * kGroup + lane * kCount + e];
          }
        }
        merged.add(scratch.max[w], scratch.sum[w], x);
      }

      // 3. Rotate back.
      const float sum = merged.sum;
      const float scale = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum * Codebook<kGroup>::kRoot);
      const int64_t token = rows.token(row);
      const int head = rows.head(row);
      float sign[kCount];
      lane_signs<kGroup, kValueSigns>(sign);
#pragma unroll
      for (int g = 0; g < Traits::kNumGroups; ++g) {
        warp_hadamard<kGroup>(merged.out[g]);
#pragma unroll
        for (int e = 0; e < kCount; ++e) merged.out[g][e] *= scale * sign[e];
        write_row(a.out, token, head, g * kGroup + lane * kCount, merged.out[g]);
      }
      if (lane == 0) {
        a.lse[head * a.lse_stride + token] = sum == 0.0f ? -INFINITY : merged.max + logf(sum);
      }
    }
    __syncthreads();  // shared memory is free for the next rows
  }
}

}  // namespace tq::cuda
