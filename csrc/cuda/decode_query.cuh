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
  float center[kCount] = {}, sink[kCount] = {}, balance[kCount];

  __device__ void load(const AttentionParams& a, const RowRange& rows, int part) {
    const int row = part / Traits::kNumGroups, g = part % Traits::kNumGroups;
    const int at = g * Traits::kGroup + (threadIdx.x & 31) * kCount;
    q = {};
    for (float& x : balance) x = 1.0f;
    if (!rows.contains(row)) return;
    q.load(a.query, rows.token(row), rows.head(row), at);
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      center[e] = a.key_frame.center(rows.kv_head)[at + e];
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
  float q[kCount], diagonal[kCount], bias = 0.0f, sink = 0.0f;
  loaded.q.convert(p.attention.query.dtype, q);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    bias += q[e] * loaded.center[e];
    sink += q[e] * (loaded.sink[e] - loaded.center[e]);
    q[e] = __fdividef(q[e], loaded.balance[e]);
  }
  bias = warp_sum(bias);
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
    out->bias[row][g] = bias * p.scale_log2;
    out->sink[row][g] = sink * p.scale_log2;
  }
}

}  // namespace tq::cuda
