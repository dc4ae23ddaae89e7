// Combine: merge the splits of paged_attention, rotate the values back, write output and
// log-sum-exp.
//
// Grid: one CTA per (query token, query head); its warps share the splits, a lane holds the same
// group / 32 coordinates of every group that warp_hadamard wants.
// out = (H D3)^T sum_s w_s out_s,   w_s = exp(lse_s - lse),   lse = log sum_s exp(lse_s)
// Latency-bound: reads num_splits * head_dim floats a row.
#include <algorithm>

#include "core/codebook.h"
#include "cuda/decode_traits.cuh"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"

namespace tq::cuda {
namespace {

constexpr int kWarps = 4;

struct CombineParams {
  AttentionParams attention;
  Partials partials;
  int num_splits;
};

template <int kHeadDim>
__global__ void __launch_bounds__(kWarps * 32)
    combine_kernel(const __grid_constant__ CombineParams p) {
  constexpr int kGroup = kHeadDim < kMaxGroup ? kHeadDim : kMaxGroup;
  constexpr int kNumGroups = kHeadDim / kGroup, kCount = kPerLane<kGroup>;
  __shared__ float s_out[kWarps][kNumGroups][kGroup];
  __shared__ float s_sum[kWarps];
  const AttentionParams& a = p.attention;
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int64_t token = blockIdx.x;
  if (token < a.query_start_loc[0] || token >= a.query_start_loc[a.num_reqs]) return;
  const int64_t row = token * a.num_heads + head;

  // 1. The largest log-sum-exp; every warp finds it for itself.
  float max = -INFINITY;
  for (int s = lane; s < p.num_splits; s += 32) {
    max = fmaxf(max, p.partials.lse[s * p.partials.num_rows + row]);
  }
  max = warp_max(max);
  // A row that sees nothing: weights exp(-inf - 0) = 0 and not exp(-inf + inf).
  const float base = max == -INFINITY ? 0.0f : max;

  // 2. Sum this warp's splits.
  float out[kNumGroups][kCount] = {}, sum = 0.0f;
#pragma unroll 4
  for (int s = warp; s < p.num_splits; s += kWarps) {
    const int64_t at = s * p.partials.num_rows + row;
    const float lse = p.partials.lse[at];
    if (lse == -INFINITY) continue;  // `out` was not written
    const float weight = __expf(lse - base);
    sum += weight;
    const float* part = p.partials.out + at * kHeadDim + lane * kCount;
#pragma unroll
    for (int g = 0; g < kNumGroups; ++g) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) out[g][e] += weight * part[g * kGroup + e];
    }
  }

  // 3. Sum the warps.
#pragma unroll
  for (int g = 0; g < kNumGroups; ++g) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) s_out[warp][g][lane * kCount + e] = out[g][e];
  }
  if (lane == 0) s_sum[warp] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += s_sum[w];
  const float scale = sum == 0.0f ? 0.0f : 1.0f / (sum * Codebook<kGroup>::kRoot);

  // 4. Rotate back, one warp a group.
  for (int g = warp; g < kNumGroups; g += kWarps) {
    float x[kCount] = {}, sign[kCount];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) x[e] += s_out[w][g][lane * kCount + e];
    }
    warp_hadamard<kGroup>(x);
    lane_signs<kGroup, kValueSigns>(sign);
#pragma unroll
    for (int e = 0; e < kCount; ++e) x[e] *= scale * sign[e];
    write_row(a.out, token, head, g * kGroup + lane * kCount, x);
  }
  if (threadIdx.x == 0)
    a.lse[head * a.lse_stride + token] = max == -INFINITY ? max : max + logf(sum);
}

struct HeadDimKernels {
  void (*decode)(const DecodeParams&, const DecodePlan&, Stream);
  int (*resident)(const DecodePlan&);
  void (*combine)(CombineParams);
};

HeadDimKernels kernels_of(int head_dim) {
  switch (head_dim) {
    case 64:
      return {launch_decode_d64, resident_decode_d64, combine_kernel<64>};
    case 128:
      return {launch_decode_d128, resident_decode_d128, combine_kernel<128>};
    case 256:
      return {launch_decode_d256, resident_decode_d256, combine_kernel<256>};
    default:
      throw std::runtime_error(
          "turboquant: paged_attention on CUDA supports head_dim 64, 128 and "
          "256, got " +
          std::to_string(head_dim));
  }
}

int rows_per_tile_of(const DecodeShape& shape) {
  const int64_t tokens_per_req = (shape.num_tokens + shape.num_reqs - 1) / shape.num_reqs;
  return tokens_per_req * (shape.num_heads / shape.num_kv_heads) <= 4 ? 4 : 8;
}

// More than two waves of CTAs on `slots` places gain nothing.
int64_t most_splits(int64_t items, int64_t slots) {
  return std::clamp<int64_t>(2 * (slots + items - 1) / items, 1, 128);
}

}  // namespace

int64_t most_splits(const DecodeShape& shape) {
  const int64_t items = shape.num_reqs * shape.num_kv_heads;
  const auto resident = kernels_of(shape.head_dim).resident;
  const int rows_per_tile = rows_per_tile_of(shape);
  const int64_t slots =
      std::max(resident({rows_per_tile, true, 1}), resident({rows_per_tile, false, 1}));
  return most_splits(items, slots);
}

DecodePlan plan_decode(const DecodeShape& shape, int64_t max_tokens) {
  const int64_t items = shape.num_reqs * shape.num_kv_heads;
  const auto resident = kernels_of(shape.head_dim).resident;
  DecodePlan plan{rows_per_tile_of(shape), true, 1};
  int64_t slots = resident(plan);
  if (items > 2 * slots) {  // or no wide CTA fits
    plan.wide = false;
    slots = std::max(resident(plan), 1);
  }
  // Fewest splits that keep the device nearly as busy as any number does; a split has 128 tokens or
  // more.
  const int64_t most = std::min(most_splits(items, slots), std::max<int64_t>(1, max_tokens / 128));
  const auto busy = [&](int64_t splits) {
    const int64_t ctas = items * splits, waves = (ctas + slots - 1) / slots;
    return static_cast<double>(ctas) / static_cast<double>(waves * slots);
  };
  double best = 0.0;
  for (int64_t s = 1; s <= most; ++s) best = std::max(best, busy(s));
  while (plan.num_splits < most && busy(plan.num_splits) < 0.95 * best) ++plan.num_splits;
  return plan;
}

void paged_attention(const AttentionParams& p, const DecodePlan& plan, const Partials& partials,
                     Stream stream) {
  constexpr float kLog2e = 1.44269504088896f;
  const HeadDimKernels kernels = kernels_of(p.cache.layout.head_dim);
  const int64_t num_tokens = partials.num_rows / p.num_heads;
  kernels.decode({p, partials, plan.num_splits, p.scale * kLog2e}, plan, stream);
  launch(kernels.combine, dim3(static_cast<unsigned>(num_tokens), p.num_heads), kWarps * 32, 0,
         static_cast<cudaStream_t>(stream), CombineParams{p, partials, plan.num_splits});
}

}  // namespace tq::cuda
