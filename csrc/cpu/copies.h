// Reading the 8-bit copies of recent tokens.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/half.h"
#include "core/params.h"

namespace tq::cpu {

// A token of a tile that is read from its copy instead of its codes.
struct CopiedToken {
  int index;            // in the tile
  const uint8_t* unit;  // of a KV head
  int offset;           // in the unit

  // Group `g` of an array of codes, and its scale.
  template <int kGroup>
  const int8_t* codes(const SlotLayout& layout, int64_t at, int g) const {
    return reinterpret_cast<const int8_t*>(unit + at) + offset * layout.head_dim + g * kGroup;
  }
  float scale(int64_t at, int g) const {
    uint16_t half;
    std::memcpy(&half, unit + at + (g * kUnitTokens + offset) * kScaleBytes, sizeof half);
    return float_from_half(half);
  }
};

}  // namespace tq::cpu
