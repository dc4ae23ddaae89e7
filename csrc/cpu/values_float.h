// Weighted sums of values in float32: AVX2 and portable. Coordinates in lanes.
#pragma once

#include <type_traits>

#include "cpu/codes.h"

namespace tq::cpu {

// Call body(std::integral_constant<int, rows>, first_row) for steps of at most kMost rows, whose
// accumulators fit into registers.
template <int kMost, typename Body>
void for_row_steps(int num_rows, const Body& body) {
  int row = 0;
  for (; row + kMost <= num_rows; row += kMost) body(std::integral_constant<int, kMost>(), row);
  if constexpr (kMost > 1) {
    if (row < num_rows) {
      for_row_steps<kMost - 1>(num_rows - row, [&](auto rows, int r) { body(rows, row + r); });
    }
  }
}

// The values of one group of up to kTokens tokens and one KV head, for kMostRows rows at a time.
template <int kGroup, int kTokens, int kMostRows>
class FloatValues {
 public:
  static constexpr int kValueRows = kMostRows;

  void load_values(const Unit* units, int num_units, const SlotLayout& layout,
                   const BlockOffsets& at, int g) {
    num_units_ = num_units;
    stride_bytes_ = layout.index_bytes();
    for (int u = 0; u < num_units; ++u) {
      values_[u] = units[u].region + at.value_index + g * kGroup / 4 +
                   int64_t{units[u].offset} * stride_bytes_;
    }
  }

  // Coordinate of a group that position `i` of out[kGroup] stands for.
  static constexpr int coordinate(int i) { return i; }

  // Add weights[num_rows][kTokens] times values to out[num_rows][kGroup].
  void add_values(const float (*weights)[kTokens], int num_rows, float* const* out) const {
    for_row_steps<kValueRows>(num_rows, [&](auto rows, int row) {
      add_rows<decltype(rows)::value>(weights + row, out + row);
    });
  }

 private:
  template <int kRows>
  void add_rows(const float (*weights)[kTokens], float* const* out) const {
    // Chains of additions a row, so that together they hide an addition's latency.
    constexpr int kChains = 2 * kRows <= kValueRows ? 2 : 1;
    for (int w = 0; w < kGroup / 16; ++w) {
      Lanes sum[kRows][kChains];
      for (int r = 0; r < kRows; ++r) {
        sum[r][0] = load(out[r] + w * 16);
        for (int c = 1; c < kChains; ++c) sum[r][c] = splat(0.0f);
      }
      for (int u = 0; u < num_units_; ++u) {
        const uint8_t* index = values_[u] + w * 4;
        for (int t = u * kLanes; t < (u + 1) * kLanes; t += kChains) {
#pragma GCC unroll 2
          for (int c = 0; c < kChains; ++c, index += stride_bytes_) {
            const Lanes value = centroid<kGroup>(spread_indices(index));
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) {
              sum[r][c] = fma(value, splat(weights[r][t + c]), sum[r][c]);
            }
          }
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int c = 1; c < kChains; ++c) sum[r][0] = sum[r][0] + sum[r][c];
        tq::store(out[r] + w * 16, sum[r][0]);
      }
    }
  }

  int num_units_;
  int64_t stride_bytes_;
  const uint8_t* values_[kTokens / kLanes];
};

}  // namespace tq::cpu
