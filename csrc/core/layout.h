// Bits, bytes and offsets of a turboquant3 cache block: the only C++ source of them.
//
// Mirrors vllm_turboquant/layout.py, which describes the format; a test holds the two equal.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace tq {

inline constexpr int kMaxGroup = 128;
inline constexpr int kMaxHeadDim = 512;
inline constexpr int kUnitTokens = 16;   // that every kernel decodes at once
inline constexpr int kSpanTokens = 512;  // positions that share a center of keys
inline constexpr int kBlockSizeMultiple = kUnitTokens;
inline constexpr int kIndexBits = 2;
inline constexpr int kSignBits = 1;
inline constexpr int kScaleBytes = 2;

// Start of each array inside the region of one (block, KV head), in bytes.
struct BlockOffsets {
  int64_t key_index;    // [block_size, head_dim / 4] uint8
  int64_t key_sign;     // [block_size, head_dim / 8] uint8
  int64_t value_index;  // [block_size, head_dim / 4] uint8
  int64_t key_scale;    // [num_groups, block_size] float16, negative for keys at the sink
  int64_t value_scale;  // [num_groups, block_size] float16
  int64_t size;         // of the region
};

// Start of each array of the 8-bit copies of a unit of one KV head, in bytes.
struct CopyOffsets {
  int64_t key;          // [16, head_dim] int8
  int64_t value;        // [16, head_dim] int8
  int64_t key_scale;    // [num_groups, 16] float16, negative for keys at the sink
  int64_t value_scale;  // [num_groups, 16] float16
  int64_t size;         // of them all
};

struct SlotLayout {
  int head_dim;

  TQ_HOST_DEVICE static constexpr bool supports(int head_dim) {
    return head_dim == 64 || (head_dim > 0 && head_dim <= kMaxHeadDim && head_dim % kMaxGroup == 0);
  }
  TQ_HOST_DEVICE constexpr int group() const { return head_dim < kMaxGroup ? head_dim : kMaxGroup; }
  TQ_HOST_DEVICE constexpr int num_groups() const { return head_dim / group(); }
  TQ_HOST_DEVICE constexpr int index_bytes() const { return head_dim * kIndexBits / 8; }
  TQ_HOST_DEVICE constexpr int sign_bytes() const { return head_dim * kSignBits / 8; }
  TQ_HOST_DEVICE constexpr int scales_bytes() const { return num_groups() * kScaleBytes; }
  TQ_HOST_DEVICE constexpr int slot_bytes() const {
    return 2 * index_bytes() + sign_bytes() + 2 * scales_bytes();
  }
  TQ_HOST_DEVICE constexpr BlockOffsets offsets(int64_t block_size) const {
    BlockOffsets at{};
    at.key_index = 0;
    at.key_sign = at.key_index + block_size * index_bytes();
    at.value_index = at.key_sign + block_size * sign_bytes();
    at.key_scale = at.value_index + block_size * index_bytes();
    at.value_scale = at.key_scale + block_size * scales_bytes();
    at.size = at.value_scale + block_size * scales_bytes();
    return at;
  }
  TQ_HOST_DEVICE constexpr CopyOffsets copy_offsets() const {
    CopyOffsets at{};
    at.key = 0;
    at.value = at.key + kUnitTokens * head_dim;
    at.key_scale = at.value + kUnitTokens * head_dim;
    at.value_scale = at.key_scale + kUnitTokens * scales_bytes();
    at.size = at.value_scale + kUnitTokens * scales_bytes();
    return at;
  }
};

static_assert(kSpanTokens % kUnitTokens == 0, "a unit's keys share their center");
static_assert(SlotLayout{128}.slot_bytes() == 84 && SlotLayout{64}.slot_bytes() == 44,
              "the sizes that the format is known by");

}  // namespace tq
