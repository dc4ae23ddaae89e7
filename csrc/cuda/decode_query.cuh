// Queries of a decode tile: rotated, scaled and split into two int8 numbers, where the key products
// want them.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/decode_traits.cuh"
#include "cuda/warp.cuh"

namespace tq::cuda {

// Rows of one KV head of one request.
struct RowRange {
  const Divisor& group_size;  // query heads of a KV head
  int64_t first_token;        // of the request, in query
  int query_len;              // tokens of the request
  int kv_head;
  int first_row;

  __device__ int num_rows() const { return query_len * group_size.value(); }
  __device__ bool contains(int row) const { return first_row + row < num_rows(); }
  // Token of the request, and in query, that a row, or padding, belongs to.
  __device__ int own_token(int row) const { return group_size.divide(first_row + row); }
  __device__ int64_t token(int row) const { return first_token + own_token(row); }
  __device__ int head(int row) const {
    return kv_head * group_size.value() + first_row + row - own_token(row) * group_size.value();
  }
};

// Write `value` in 15 bits, its high and low part in neighbouring columns of the operand at
// `position`.
template <int kColumns>
__device__ inline void write_operand(uint8_t (*operand)[2][kColumns][4][4],
                                     const OperandPosition& position, int column, int value) {
  const int high = (value + 64) >> 7, low = value - high * 128;
  uint8_t (*columns)[4][4] = operand[position.product][position.half];
  columns[column][position.lane][position.byte] = static_cast<uint8_t>(high);
  columns[column + 1][position.lane][position.byte] = static_cast<uint8_t>(low);
}

// This lane's coordinates of one part of a query tile, which is a group of a row, and of the frame.
template <typename Traits>
struct LoadedQuery {
  static constexpr int kCount = kPerLane<Traits::kGroup>;
  RowElements<kCount> q;
  float sink[kCount] = {}, balance[kCount];

  __device__ void load(const AttentionParams& a, const RowRange& rows, int part) {
    const int row = part / Traits::kNumGroups, g = part % Traits::kNumGroups;
    const int at = g * Traits::kGroup + (threadIdx.x & 31) * kCount;
    q = {};
    for (float& x : balance) x = 1.0f;
    if (!rows.contains(row)) return;
    q.load(a.query, rows.token(row), rows.head(row), at);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      sink[e] = a.key_frame.sink(rows.kv_head)[at + e];
      balance[e] = a.key_frame.balance(rows.kv_head)[at + e];
    }
  }
};

// Prepare one part with one warp.
template <typename Traits>
__device__ inline void prepare_query(const DecodeParams& p, const LoadedQuery<Traits>& loaded,
                                     int part, typename Traits::Query* out) {
  constexpr int kGroup = Traits::kGroup, kCount = kPerLane<kGroup>;
  constexpr float kLargest = 127.0f * 128.0f;
  const int lane = threadIdx.x & 31, first = lane * kCount;
  const int row = part / Traits::kNumGroups, g = part % Traits::kNumGroups;
  const int column = row / 4 * 8 + row % 4 * 2;

  // 1. q1 = H D1 B^-1 q and q2 = H D2 q1, softmax scale included.
  float q[kCount], diagonal[kCount], sink = 0.0f;
  loaded.q.convert(p.attention.query.dtype, q);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    sink += q[e] * loaded.sink[e];
    q[e] = __fdividef(q[e], loaded.balance[e]);
  }
  sink = warp_sum(sink);
  lane_signs<kGroup, kKeySigns>(diagonal);
#pragma unroll
  for (int e = 0; e < kCount; ++e) q[e] *= diagonal[e];
  warp_hadamard<kGroup>(q);
  float projected[kCount];
  lane_signs<kGroup, kResidualSigns>(diagonal);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    q[e] *= p.scale_log2 * (1.0f / Codebook<kGroup>::kRoot);
    projected[e] = q[e] * diagonal[e];
  }
  warp_hadamard<kGroup>(projected);

  // 2. Weights of the integers that codes stand for. A sign is rho * (2 b - 1) for its bit b.
  float sum = 0.0f, largest = 0.0f;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const int power = sign_power(first + e);
    projected[e] *= Codebook<kGroup>::kQjlWeight;
    sum += projected[e];
    projected[e] *= power == 7 ? -0x1p-6f : __int_as_float((128 - power) << 23);  // 2^(1 - power)
    q[e] *= IntegerBook<kGroup>::kUnit;
    largest = fmaxf(largest, fmaxf(fabsf(q[e]), fabsf(projected[e])));
  }
  sum = warp_sum(sum);
  largest = warp_max(largest);

  // 3. Round them to 15 bits.
  const float inverse = largest > 0.0f ? __fdividef(kLargest, largest) : 0.0f;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    write_operand<Traits::kKeyTiles * 8>(out->index[g], index_position<kGroup>(first + e), column,
                                         __float2int_rn(q[e] * inverse));
    write_operand<Traits::kKeyTiles * 8>(out->sign[g], sign_position<kGroup>(first + e), column,
                                         __float2int_rn(projected[e] * inverse));
  }
  if (lane == 0) {
    // The sum carries NaN and infinity of a query into its scores; integers cannot.
    out->unit[row][g] = largest * (1.0f / kLargest) + 0.0f * sum;
    out->base[row][g] = __float2int_rn(-sum * inverse);
    out->sink[row][g] = sink * p.scale_log2;
  }
}

// Spans of positions, of which keys are read.
struct SpanRange {
  int first, count;

  // Those of tokens [begin, end), at most so many.
  __device__ static SpanRange of(int begin, int end, int most) {
    const int first = begin / kSpanTokens;
    return {first, min((end + kSpanTokens - 1) / kSpanTokens - first, most)};
  }
};

// Scores the centers of spans of codes and, behind kSpans, of those of a window: a part of one, as
// of a query, in every warp, of which each has kAtOnce in flight.
template <typename Traits, int kAtOnce>
class SpanScorer {
 public:
  using Scores = typename Traits::SpanScores;

  __device__ SpanScorer(const DecodeParams& p, const RowRange& rows, const SpanRange& codes,
                        const SpanRange& window, Scores* scores)
      : p_(p),
        rows_(rows),
        codes_(codes),
        window_(window),
        scores_(scores),
        next_(Traits::kWarps - 1 - threadIdx.x / 32) {}  // the first warps prepare the queries

  // Ask for what the next parts need.
  __device__ void load() {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int item = next_ + k * Traits::kWarps;
      if (item < num_items()) load(item / Traits::kQueryParts, item % Traits::kQueryParts, k);
    }
  }

  // Score them, and then all others.
  __device__ void score() {
    while (next_ < num_items()) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k, next_ += Traits::kWarps) {
        if (next_ < num_items()) score(next_ / Traits::kQueryParts, next_ % Traits::kQueryParts, k);
      }
      load();
    }
  }

 private:
  static constexpr int kCount = kPerLane<Traits::kGroup>;

  __device__ int num_items() const { return (codes_.count + window_.count) * Traits::kQueryParts; }

  __device__ void load(int i, int part, int k) {
    const AttentionParams& a = p_.attention;
    const int span = i < codes_.count ? codes_.first + i : window_.first + i - codes_.count;
    const int row = part / Traits::kNumGroups, g = part % Traits::kNumGroups;
    const int at = g * Traits::kGroup + (threadIdx.x & 31) * kCount;
    q_[k] = {};
    if (!rows_.contains(row)) return;
    q_[k].load(a.query, rows_.token(row), rows_.head(row), at);
    const float* center = a.key_frame.near(rows_.kv_head, int64_t{span} * kSpanTokens) + at;
#pragma unroll
    for (int e = 0; e < kCount; ++e) center_[k][e] = center[e];
  }

  __device__ void score(int i, int part, int k) {
    float q[kCount], score = 0.0f;
    q_[k].convert(p_.attention.query.dtype, q);
#pragma unroll
    for (int e = 0; e < kCount; ++e) score += q[e] * center_[k][e];
    score = warp_sum(score);
    if ((threadIdx.x & 31) == 0) {
      Scores& to = scores_[i < codes_.count ? i : Traits::kSpans + i - codes_.count];
      to[part / Traits::kNumGroups][part % Traits::kNumGroups] = score * p_.scale_log2;
    }
  }

  const DecodeParams& p_;
  const RowRange& rows_;
  const SpanRange codes_, window_;
  Scores* scores_;
  int next_;
  RowElements<kCount> q_[kAtOnce];
  float center_[kAtOnce][kCount] = {};
};

}  // namespace tq::cuda
