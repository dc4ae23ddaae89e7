// Arithmetic on codes in float32: AVX2 and portable.
//
// Score of a row: <q1, C[i]> + rho <q2, s>, tokens in lanes; output: coordinates in lanes. Neither
// needs a horizontal sum. About 3 instructions per coordinate and row, sixteen lanes each.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/codes.h"

namespace tq::cpu {

// Call body(std::integral_constant<int, rows>, first_row) for steps of at most 8 rows, whose
// accumulators fit into registers.
template <typename Body>
void for_row_steps(int num_rows, const Body& body) {
  for (int first = 0; first < num_rows; first += 8) {
    switch (std::min(8, num_rows - first)) {
      case 1:
        body(std::integral_constant<int, 1>(), first);
        break;
      case 2:
        body(std::integral_constant<int, 2>(), first);
        break;
      case 3:
        body(std::integral_constant<int, 3>(), first);
        break;
      case 4:
        body(std::integral_constant<int, 4>(), first);
        break;
      case 5:
        body(std::integral_constant<int, 5>(), first);
        break;
      case 6:
        body(std::integral_constant<int, 6>(), first);
        break;
      case 7:
        body(std::integral_constant<int, 7>(), first);
        break;
      case 8:
        body(std::integral_constant<int, 8>(), first);
        break;
    }
  }
}

// The codes of one group of up to kTokens tokens and one KV head.
template <int kGroup>
class CodeTile {
 public:
  static constexpr int kScoreRows = 8, kValueRows = 8;  // whose accumulators fit into registers
  static constexpr int kTokens = 64;  // tokens between two updates of the running maximum

  // One group of a query row.
  struct Query {
    float q1[kGroup];
    float q2[kGroup];  // doubled: a sign bit b stands for 2 b - 1
    float base;        // what all bits 0 give

    // q1 and q2 are [kGroup]; q2 includes rho.
    void prepare(const float* q1_, const float* q2_) {
      base = 0;
      for (int j = 0; j < kGroup; ++j) {
        q1[j] = q1_[j];
        q2[j] = 2 * q2_[j];
        base -= q2_[j];
      }
    }
  };

  void load_keys(const Unit* units, int num_units, const SlotLayout& layout, const BlockOffsets& at,
                 int g, int num_rows) {
    num_units_ = num_units;
    // Decoding signs costs a transform, which pays once enough rows share it.
    decode_ = num_rows > 8;
    for (int u = 0; u < num_units; ++u) {
      keys_[u] = KeyWords<kGroup>(units[u], layout, at, g);
      if (decode_) keys_[u].decode(decoded_[u]);
    }
  }

  // Add alpha * <q, key> to scores[num_rows][kTokens], or set them to it for the first group.
  void score(const Query* queries, int num_rows, const float* alpha, bool first,
             float (*scores)[kTokens]) const {
    for (int u = 0; u < num_units_; ++u) {
      for_row_steps(num_rows, [&](auto rows, int row) {
        constexpr int kRows = decltype(rows)::value;
        Lanes dot[kRows];
        if (decode_) {
          score_decoded<kRows>(decoded_[u], queries + row, dot);
        } else {
          score_codes<kRows>(keys_[u], queries + row, dot);
        }
        for (int r = 0; r < kRows; ++r) {
          float* x = &scores[row + r][u * kLanes];
          tq::store(x, fma(load(alpha + u * kLanes), dot[r], first ? splat(0.0f) : load(x)));
        }
      });
    }
  }

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
    for (int u = 0; u < num_units_; ++u) {
      for_row_steps(num_rows, [&](auto rows, int row) {
        add_rows<decltype(rows)::value>(u, weights + row, out + row);
      });
    }
  }

 private:
  template <int kRows>
  static void score_codes(const KeyWords<kGroup>& key, const Query* q, Lanes* dot) {
    Lanes by_index[kRows], by_sign[kRows];
    for (int r = 0; r < kRows; ++r) by_index[r] = splat(q[r].base), by_sign[r] = splat(0.0f);
    for (int w = 0; w < kGroup / 16; ++w) {
      const Words index = key.index[w], sign = key.sign[w / 2] >> (w % 2 * 16);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        const Lanes c = centroid<kGroup>(index >> (2 * j));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          by_index[r] = fma(c, splat(q[r].q1[w * 16 + j]), by_index[r]);
          by_sign[r] = add_where_bit(by_sign[r], sign, j, splat(q[r].q2[w * 16 + j]));
        }
      }
    }
    for (int r = 0; r < kRows; ++r) dot[r] = by_index[r] + by_sign[r];
  }

  template <int kRows>
  static void score_decoded(const Lanes* key, const Query* q, Lanes* dot) {
    for (int r = 0; r < kRows; ++r) dot[r] = splat(0.0f);
    for (int j = 0; j < kGroup; ++j) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) dot[r] = fma(key[j], splat(q[r].q1[j]), dot[r]);
    }
  }

  template <int kRows>
  void add_rows(int u, const float (*weights)[kTokens], float* const* out) const {
    for (int w = 0; w < kGroup / 16; ++w) {
      Lanes even[kRows], odd[kRows];  // two chains hide the latency of the fused multiply-add
      for (int r = 0; r < kRows; ++r) even[r] = load(out[r] + w * 16), odd[r] = splat(0.0f);
      const uint8_t* index = values_[u] + w * 4;
      for (int t = u * kLanes; t < (u + 1) * kLanes; t += 2, index += 2 * stride_bytes_) {
        const Lanes c0 = centroid<kGroup>(spread_indices(index));
        const Lanes c1 = centroid<kGroup>(spread_indices(index + stride_bytes_));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          even[r] = fma(c0, splat(weights[r][t]), even[r]);
          odd[r] = fma(c1, splat(weights[r][t + 1]), odd[r]);
        }
      }
      for (int r = 0; r < kRows; ++r) tq::store(out[r] + w * 16, even[r] + odd[r]);
    }
  }

  int num_units_;
  bool decode_;
  int64_t stride_bytes_;
  KeyWords<kGroup> keys_[kTokens / kLanes];
  Lanes decoded_[kTokens / kLanes][kGroup];
  const uint8_t* values_[kTokens / kLanes];
};

}  // namespace tq::cpu
