// Arithmetic on codes in float32: portable.
//
// Score of a row: <q1, C[i]> + rho <q2, s>, tokens in lanes; output: coordinates in lanes. Neither
// needs a horizontal sum. About 3 instructions per coordinate and row, sixteen lanes each.
#pragma once

#include <type_traits>

#include "cpu/codes.h"
#include "cpu/values_float.h"

namespace tq::cpu {

// The codes of one group of up to 64 tokens and one KV head.
template <int kGroup>
class CodeTile : public FloatValues<kGroup, 64, 8> {
 public:
  static constexpr int kTokens = 64;  // tokens between two updates of the running maximum
  static constexpr int kScoreRows = 8;

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
      for_row_steps<kScoreRows>(num_rows, [&](auto rows, int row) {
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

  int num_units_;
  bool decode_;
  KeyWords<kGroup> keys_[kTokens / kLanes];
  Lanes decoded_[kTokens / kLanes][kGroup];
};

}  // namespace tq::cpu
