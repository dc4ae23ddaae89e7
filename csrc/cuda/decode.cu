// How paged_attention divides its work, and its launch.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/decode_traits.cuh"
#include "cuda/launch.cuh"

namespace tq::cuda {
namespace {

struct HeadDimKernels {
  void (*decode)(const DecodeParams&, const DecodePlan&, bool overlaps, Stream);
  Residency (*residency)(const DecodePlan&);
};

HeadDimKernels kernels_of(int head_dim) {
  switch (head_dim) {
    case 64:
      return {launch_decode_d64, residency_d64};
    case 128:
      return {launch_decode_d128, residency_d128};
    case 256:
      return {launch_decode_d256, residency_d256};
    default:
      throw std::runtime_error(
          "turboquant: paged_attention on CUDA supports head_dim 64, 128 and "
          "256, got " +
          std::to_string(head_dim));
  }
}

int rows_of(const DecodeShape& shape) {
  const int64_t tokens_per_req = (shape.num_tokens + shape.num_reqs - 1) / shape.num_reqs;
  return std::clamp<int64_t>(tokens_per_req * (shape.num_heads / shape.num_kv_heads), 1, 8);
}

// A CTA knows the centers of so many tokens' keys.
int64_t fewest_splits(int64_t max_tokens) {
  return std::max<int64_t>((max_tokens + kMostSplitTokens - 1) / kMostSplitTokens, 1);
}

// More than two waves of CTAs on `slots` places gain nothing.
int64_t most_splits(int64_t items, int64_t slots, int64_t max_tokens) {
  return std::max(std::clamp<int64_t>(2 * (slots + items - 1) / items, 1, 128),
                  fewest_splits(max_tokens));
}

}  // namespace

int64_t most_splits(const DecodeShape& shape, int64_t max_tokens) {
  const int64_t items = shape.num_reqs * shape.num_kv_heads;
  const auto residency = kernels_of(shape.head_dim).residency;
  const int rows = rows_of(shape);
  const int64_t slots = std::max(residency({rows, true, 1}).ctas, residency({rows, false, 1}).ctas);
  return most_splits(items, slots, max_tokens);
}

DecodePlan plan_decode(const DecodeShape& shape, int64_t max_tokens) {
  const int64_t items = shape.num_reqs * shape.num_kv_heads;
  const auto residency = kernels_of(shape.head_dim).residency;
  DecodePlan plan{rows_of(shape), true, 1};
  int64_t slots = residency(plan).ctas;
  if (items > 2 * slots) {  // or no wide CTA fits
    plan.wide = false;
    slots = std::max(residency(plan).ctas, 1);
  }
  // Fewest splits that keep the device nearly as busy as any number does; a split has 128 tokens or
  // more.
  const int64_t most =
      std::min(most_splits(items, slots, max_tokens), std::max<int64_t>(1, max_tokens / 128));
  const auto busy = [&](int64_t splits) {
    const int64_t ctas = items * splits, waves = (ctas + slots - 1) / slots;
    return static_cast<double>(ctas) / static_cast<double>(waves * slots);
  };
  plan.num_splits = static_cast<int>(fewest_splits(max_tokens));
  double best = 0.0;
  for (int64_t s = 1; s <= most; ++s) best = std::max(best, busy(s));
  while (plan.num_splits < most && busy(plan.num_splits) < 0.95 * best) ++plan.num_splits;
  return plan;
}

void paged_attention(const AttentionParams& p, const DecodePlan& plan, const Partials& partials,
                     const StoreParams* new_tokens, Stream stream) {
  constexpr float kLog2e = 1.44269504088896f;
  const HeadDimKernels kernels = kernels_of(p.cache.layout.head_dim);
  DecodeParams params{p,
                      partials,
                      Divisor(plan.num_splits),
                      Divisor(p.num_heads / p.cache.num_kv_heads),
                      Divisor(p.cache.block_size / kUnitTokens),
                      Divisor(1),  // as launch_traits says, which knows the warps
                      p.scale * kLog2e,
                      false};
  bool overlaps = false;
  if (new_tokens && new_tokens->num_tokens > 0) {
    // One wave of wide CTAs gains by it. Where some of them have to wait until store is done, all
    // do: those would look up what they read behind all that the others fetch.
    const int64_t ctas = int64_t{plan.num_splits} * p.cache.num_kv_heads * p.num_reqs;
    const Residency residency = kernels.residency(plan);
    overlaps = residency.can_overlap && plan.wide && ctas <= residency.ctas;
    params.awaits_first = overlaps && ctas + store_ctas(*new_tokens) > residency.ctas;
    store(*new_tokens, stream, overlaps);
  }
  kernels.decode(params, plan, overlaps, stream);
}

}  // namespace tq::cuda
