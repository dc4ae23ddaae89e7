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
    out->plain[row][g * kGroup + first + e] = q[e];
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

  // Those of tokens [begin, end).
  __device__ static SpanRange of(int begin, int end) {
    const int first = begin / kSpanTokens;
    return {first, (end + kSpanTokens - 1) / kSpanTokens - first};
  }
};

// Scores the centers of spans, each of which is one warp's turn. The first warps prepare the
// queries, so the last ones begin.
template <typename Traits>
class SpanScorer {
 public:
  __device__ SpanScorer(const AttentionParams& p, int kv_head, const SpanRange& spans)
      : p_(p), kv_head_(kv_head), spans_(spans), next_(Traits::kWarps - 1 - threadIdx.x / 32) {
    load();
    // What comes later is brought closer.
    constexpr int kLineFloats = 32, kLines = Traits::kHeadDim / kLineFloats;
    for (int i = threadIdx.x; i < spans.count * kLines; i += Traits::kThreads) {
      prefetch_l2(center(i / kLines) + i % kLines * kLineFloats);
    }
  }

  // Score them with the rows of prepared queries, behind a barrier.
  __device__ void score(const typename Traits::Query& query, float scale_log2,
                        typename Traits::SpanScores* scores) {
    while (next_ < spans_.count) {
      typename Traits::SpanScores& to = scores[(spans_.first + next_) % kMostSpans];
#pragma unroll
      for (int row = 0; row < Traits::kRows; ++row) {
#pragma unroll
        for (int g = 0; g < Traits::kNumGroups; ++g) {
          const float* q = query.plain[row] + g * Traits::kGroup + first();
          float score = 0.0f;
#pragma unroll
          for (int e = 0; e < kCount; ++e) score += q[e] * center_[g][e];
          score = warp_sum(score);
          if ((threadIdx.x & 31) == 0) to[row][g] = score * scale_log2;
        }
      }
      next_ += Traits::kWarps;
      load();
    }
  }

 private:
  static constexpr int kCount = kPerLane<Traits::kGroup>;

  __device__ const float* center(int i) const {
    return p_.key_frame.near(kv_head_, int64_t{spans_.first + i} * kSpanTokens);
  }

  __device__ void load() {
    if (next_ >= spans_.count) return;
    const float* from = center(next_) + first();
#pragma unroll
    for (int g = 0; g < Traits::kNumGroups; ++g) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) center_[g][e] = from[g * Traits::kGroup + e];
    }
  }

  // This lane's coordinate of a group.
  __device__ static int first() { return (threadIdx.x & 31) * kCount; }

  const AttentionParams& p_;
  const int kv_head_;
  const SpanRange spans_;
  int next_;
  float center_[Traits::kNumGroups][kCount];
};

}  // namespace tq::cuda
