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
  RowElements<kCount> q = {};
  float balance[kCount] = {};

  __device__ void load(const AttentionParams& a, const RowRange& rows, int part) {
    const int row = part / Traits::kNumGroups, g = part % Traits::kNumGroups;
    const int at = g * Traits::kGroup + (threadIdx.x & 31) * kCount;
    q = {};
    for (float& x : balance) x = 1.0f;
    if (!rows.contains(row)) return;
    q.load(a.query, rows.token(row), rows.head(row), at);
#pragma unroll
    for (int e = 0; e < kCount; ++e) balance[e] = a.key_frame.balance(rows.kv_head)[at + e];
  }
};

// This lane's coordinates of a part in shared memory.
template <typename Traits>
__device__ inline float* plain_query(typename Traits::Query& query, int part) {
  constexpr int kCount = kPerLane<Traits::kGroup>;
  return query.plain[part / Traits::kNumGroups] + part % Traits::kNumGroups * Traits::kGroup +
         (read_thread() & 31) * kCount;
}

// Share one part as it is.
template <typename Traits>
__device__ inline void share_query(const AttentionParams& a, const LoadedQuery<Traits>& loaded,
                                   int part, typename Traits::Query* out) {
  float q[kPerLane<Traits::kGroup>];
  loaded.q.convert(a.query.dtype, q);
  store_lanes(plain_query<Traits>(*out, part), q);
}

// Prepare one part, which has been shared, with one warp.
template <typename Traits>
__device__ inline void prepare_query(const DecodeParams& p, const LoadedQuery<Traits>& loaded,
                                     int part, typename Traits::Query* out) {
  constexpr int kGroup = Traits::kGroup, kCount = kPerLane<kGroup>;
  constexpr float kLargest = 127.0f * 128.0f;
  const int lane = read_thread() & 31, first = lane * kCount;
  const int row = part / Traits::kNumGroups, g = part % Traits::kNumGroups;
  const int column = row / 4 * 8 + row % 4 * 2;

  // 1. q1 = H D1 B^-1 q and q2 = H D2 q1, softmax scale included.
  float q[kCount], diagonal[kCount];
  load_lanes(plain_query<Traits>(*out, part), q);
#pragma unroll
  for (int e = 0; e < kCount; ++e) q[e] = __fdividef(q[e], loaded.balance[e]);
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
    out->base[row][g] = -sum;
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

// Scores the centers of spans and the sink, each of these origins one warp's turn. The first warps
// prepare the queries, so the last ones begin.
template <typename Traits>
class SpanScorer {
 public:
  __device__ SpanScorer(const AttentionParams& p, int kv_head, const SpanRange& spans)
      : frame_(p.key_frame),
        kv_head_(kv_head),
        spans_(spans),
        first_(Traits::kWarps - 1 - threadIdx.x / 32) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(first_ + i * Traits::kWarps, origins_[i]);
  }

  // The query is shared by all warps already.
  __device__ void score(float scale_log2, typename Traits::Shared* shared) {
    constexpr int kLanes = 32 / Traits::kQueryParts;  // that have the score of a part
    for (int next = first_; next <= spans_.count; next += kAhead * Traits::kWarps) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int index = next + i * Traits::kWarps;
        if (index > spans_.count) break;
        const float score = scale_log2 * dot(shared->query, origins_[i]);
        load(index + kAhead * Traits::kWarps, origins_[i]);
        auto& scores = index < spans_.count ? shared->spans[(spans_.first + index) % kMostSpans]
                                            : shared->sink;
        const int lane = read_thread() & 31;
        if (lane % kLanes == 0) (&scores[0][0])[lane / kLanes] = score;
      }
    }
  }

 private:
  static constexpr int kCount = kPerLane<Traits::kGroup>;
  static constexpr int kAhead = 2;  // origins of a warp that are loaded before they are needed
  using Origin = float[Traits::kNumGroups][kCount];

  // The center of a span, or, after the last one, the sink.
  __device__ void load(int index, Origin& to) const {
    if (index > spans_.count) return;
    const float* from = index < spans_.count
                            ? frame_.near(kv_head_, int64_t{spans_.first + index} * kSpanTokens)
                            : frame_.sink(kv_head_);
#pragma unroll
    for (int g = 0; g < Traits::kNumGroups; ++g) {
      load_lanes(from + g * Traits::kGroup + (threadIdx.x & 31) * kCount, to[g]);
    }
  }

  // Inner product with the part, row and group, that is lane / (32 / kQueryParts).
  __device__ static float dot(const typename Traits::Query& query, const Origin& origin) {
    float sums[Traits::kQueryParts];
    const int lane = read_thread() & 31;
#pragma unroll
    for (int i = 0; i < Traits::kQueryParts; ++i) {
      const int row = i / Traits::kNumGroups, g = i % Traits::kNumGroups;
      float q[kCount];
      load_lanes(query.plain[row] + g * Traits::kGroup + lane * kCount, q);
      sums[i] = 0.0f;
#pragma unroll
      for (int e = 0; e < kCount; ++e) sums[i] += q[e] * origin[g][e];
    }
    return warp_sums(sums);
  }

  const KeyFrame& frame_;
  const int kv_head_;
  const SpanRange spans_;
  const int first_;
  // NOTE: {}, because what is not always set is kept in registers from one tile to the next.
  Origin origins_[kAhead] = {};
};

}  // namespace tq::cuda
