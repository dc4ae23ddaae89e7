// What a decode kernel is told, and the sizes that a head dimension and a tile of rows fix.
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "core/params.h"
#include "cuda/divisor.cuh"
#include "cuda/kernels.h"

namespace tq::cuda {

// How a plan's CTAs share the current device.
struct Residency {
  int ctas;          // that run at once, if nothing else does
  bool can_overlap;  // see launch
};

struct DecodeParams {
  AttentionParams attention;
  Partials partials;
  Divisor num_splits;
  Divisor group_size;  // query heads of a KV head
  Divisor units_per_block;
  Divisor warps_per_row;  // that merge the splits
  float scale_log2;       // softmax scale * log2(e)
  bool awaits_first;      // the store that it overlaps, before anything else
};

// Spans of positions that a split's tokens are in, at most. A window may begin in the one before
// them, and neither needs to begin with a span.
inline constexpr int kMostSpans = 128;
inline constexpr int kMostSplitTokens = (kMostSpans - 3) * kSpanTokens;

template <int kHeadDim_, int kRows_, int kWarps_, int kMinCtas_>
struct DecodeTraits {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kRows_;  // query rows of a KV head: head in its group x query token
  static constexpr int kGroup = kHeadDim < kMaxGroup ? kHeadDim : kMaxGroup;
  static constexpr int kNumGroups = kHeadDim / kGroup;
  static constexpr int kWarps = kWarps_;
  static constexpr int kMinCtas = kMinCtas_;  // of one SM; bounds the registers
  static constexpr bool kIsWide = kMinCtas == 1;
  static constexpr int kThreads = kWarps * 32;

  // A unit is 16 tokens of one block; a batch is what a warp scores between two looks at the
  // maximum.
  static constexpr int kUnitTokens = tq::kUnitTokens;
  static constexpr int kBatchUnits = 2;
  static constexpr int kBatchTokens = kBatchUnits * kUnitTokens;
  // Units from the first of a window on that a batch with tokens of it may have.
  static constexpr int kWindowUnits = kMostWindowUnits + kBatchUnits;
  static constexpr int kStages = kHeadDim > 128 ? 3 : 4;

  // A query is two int8 numbers, high and low, in neighbouring columns of the key products.
  static constexpr int kKeyTiles = kRows / 4;
  static constexpr int kQueryParts = kRows * kNumGroups;  // each prepared by one warp
  static constexpr int kProducts = kGroup / 32;
  static constexpr int kValueWords = kGroup / 64;  // of 8 coordinates, per lane

  // Offsets in a unit's copy in shared memory, in the order of a block region.
  static constexpr int kIndexBytes = kUnitTokens * kHeadDim / 4;
  static constexpr int kSignBytes = kUnitTokens * kHeadDim / 8;
  static constexpr int kScaleRowBytes = kUnitTokens * kScaleBytes;
  static constexpr int kKeySignAt = kIndexBytes;
  static constexpr int kValueIndexAt = kKeySignAt + kSignBytes;
  static constexpr int kKeyScaleAt = kValueIndexAt + kIndexBytes;
  static constexpr int kValueScaleAt = kKeyScaleAt + kNumGroups * kScaleRowBytes;
  static constexpr int kUnitBytes = kValueScaleAt + kNumGroups * kScaleRowBytes;
  static constexpr int kUnitChunks = kUnitBytes / 16;
  static constexpr int kChunksPerLane = (kUnitChunks + 31) / 32;
  static constexpr int kBatchBytes = kBatchUnits * kUnitBytes;
  static constexpr int kRingBytes = kStages * kBatchBytes;  // of one warp

  // Units of copies that are read ahead, while the warps read codes: those of the default window,
  // where a CTA has an SM's shared memory to itself and they fit.
  static constexpr int kCopyBuffers = kIsWide ? (kHeadDim > 128 ? 2 : 3) : 0;
  static constexpr int kCopyBytes = SlotLayout{kHeadDim}.copy_offsets().size;

  struct Query {
    alignas(16) uint8_t index[kNumGroups][kProducts][2][kKeyTiles * 8][4][4];
    alignas(16) uint8_t sign[kNumGroups][kProducts][2][kKeyTiles * 8][4][4];
    float unit[kRows][kNumGroups];  // score of an integer product of 1
    float base[kRows][kNumGroups];  // score of signs that are all -1
    alignas(16) float plain[kRows][kHeadDim];
  };
  using OriginScores = float[kRows][kNumGroups];  // <q, center of a span> or sink, scaled, in log2
  // Results of the warps, in units of the largest maximum.
  struct Merge {
    // Lanes write 16 bytes of two rows at once; the padding brings them to different banks.
    alignas(16) float out[kWarps][kRows / 2][2 * kHeadDim + 4];
    alignas(16) float sum[kRows][kWarps];

    __device__ float* row(int warp, int row) { return out[warp][row / 2] + row % 2 * kHeadDim; }
  };
  struct Combine {
    float out[kWarps][kHeadDim];
    float max[kWarps], sum[kWarps];
    // The result of the only split, which need not leave the CTA.
    alignas(16) float only_out[kRows][kHeadDim];
    float only_lse[kRows];
  };
  struct Stream {
    int2 pieces[kChunksPerLane][32];  // offset in a region, and per unit of the block; in bytes
    // Tables of integers and of halves, twice: read by lane, they stay in registers; a constant or
    // a value that all lanes share would be moved there again at every use.
    uint2 tables[2];
  };
  // What a CTA does: its request's query tokens, and batches [begin, end) of its tokens.
  struct Work {
    int first_token, query_len;  // of the request, in query
    int begin, end;
    int num_splits;  // of the request
  };
  struct Shared {
    Work work;  // read again after the loop over batches, during which registers are scarce
    Query query;
    Stream stream;
    union {  // the ring is done with when the warps merge
      alignas(128) uint8_t ring[kWarps][kRingBytes];
      struct {
        Merge merge;
        Combine combine;
      };
    };
    alignas(16) float max[kRows][kWarps];  // log2, of each warp
    alignas(16) float sum[kRows][kWarps];  // in units of its maximum
    alignas(16) uint8_t copies[kCopyBuffers > 0 ? kCopyBuffers * kCopyBytes : 1];
    OriginScores sink;
    OriginScores spans[kMostSpans];  // of the span i * kMostSpans + its index, whatever i is

    // Of the span of a token.
    __device__ const OriginScores& span_of(int token) const {
      return spans[static_cast<unsigned>(token) / kSpanTokens % kMostSpans];
    }
    // Where the results of an only split go, which need not leave the CTA.
    __device__ Combine* only() { return work.num_splits <= 1 ? &combine : nullptr; }

    int32_t window[kWindowUnits];  // entries of Copies::unit_map
    bool is_last;                  // of the request's splits
  };

  static_assert(kRows == 4 || kRows == 8, "values are multiplied with at most eight columns");
  static_assert(kUnitBytes % 16 == 0, "a unit is copied in 16-byte pieces");
  static_assert(32 % kBatchUnits == 0, "lanes find the blocks of whole batches");
  static_assert(kSpanTokens % kBatchTokens == 0, "a batch's keys share their center");
};

// Wide CTAs fill an SM alone: their warps share one prologue and one merge. Narrow ones overlap
// those of one CTA with the work of others, which pays once there are several waves of them.
template <int kHeadDim, int kRows>
struct DecodeShapes {
  // As many as registers allow.
  static constexpr int kWarps = (kHeadDim > 128 ? 12 : 16) - (kRows > 4 ? 4 : 0);
  using Wide = DecodeTraits<kHeadDim, kRows, kWarps, 1>;
  // Left alone, the compiler would take a few registers more than let four of head_dim 64 in. Of
  // head_dim 256, shared memory has room for two.
  static constexpr int kNarrowCtas = kHeadDim == 64 ? 4 : kHeadDim == 128 ? kWarps / 4 : 2;
  using Narrow = DecodeTraits<kHeadDim, kRows, 4, kNarrowCtas>;
};

// One instantiation a file: they take long to compile.
void launch_decode_d64(const DecodeParams& p, const DecodePlan& plan, bool overlaps, Stream stream);
void launch_decode_d128(const DecodeParams& p, const DecodePlan& plan, bool overlaps,
                        Stream stream);
void launch_decode_d256(const DecodeParams& p, const DecodePlan& plan, bool overlaps,
                        Stream stream);
Residency residency_d64(const DecodePlan& plan);
Residency residency_d128(const DecodePlan& plan);
Residency residency_d256(const DecodePlan& plan);

}  // namespace tq::cuda
