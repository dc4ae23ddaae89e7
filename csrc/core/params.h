// What a kernel is told: plain structs of pointers, sizes and strides.
//
// Strides are in elements unless the name ends in _bytes.
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "core/macros.h"

namespace tq {

enum class Dtype { kFloat32, kFloat16, kBfloat16 };

// A tensor [num_tokens, num_heads, head_dim] whose last axis is contiguous.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t token_stride;
  int64_t head_stride;
};

struct MutableRows {
  void* data;
  Dtype dtype;
  int64_t token_stride;
  int64_t head_stride;
};

// Block pool [num_blocks, num_kv_heads, block_size, slot_bytes] uint8; each (block, head) is one
// contiguous region of SlotLayout. Offsets need 64 bits: a pool may exceed 2 GiB.
struct Cache {
  uint8_t* data;
  int64_t block_stride_bytes;
  int64_t head_stride_bytes;
  int64_t num_blocks;
  int block_size;
  int num_kv_heads;
  SlotLayout layout;

  uint8_t* region(int64_t block, int64_t kv_head) const {
    return data + block * block_stride_bytes + kv_head * head_stride_bytes;
  }
};

// What the keys of every KV head are coded in (frame.py): [num_kv_heads, 3 + num_spans, head_dim]
// contiguous.
struct KeyFrame {
  const float* data;
  int head_dim;
  int num_spans;

  TQ_HOST_DEVICE const float* center(int64_t kv_head) const { return row(kv_head, 0); }
  TQ_HOST_DEVICE const float* sink(int64_t kv_head) const { return row(kv_head, 1); }
  TQ_HOST_DEVICE const float* balance(int64_t kv_head) const { return row(kv_head, 2); }

  // Where keys of a position, of padding any, start that do not start at the sink.
  TQ_HOST_DEVICE const float* near(int64_t kv_head, int64_t position) const {
    if (num_spans == 0) return center(kv_head);
    const uint64_t span = static_cast<uint64_t>(position) / kSpanTokens;
    const bool is_last = span >= static_cast<uint64_t>(num_spans);
    return row(kv_head, 3 + (is_last ? num_spans - 1 : static_cast<int>(span)));
  }

 private:
  TQ_HOST_DEVICE const float* row(int64_t kv_head, int i) const {
    return data + (kv_head * (3 + num_spans) + i) * head_dim;
  }
};

struct BlockTable {
  const int32_t* data;  // [num_reqs, max_blocks]
  int64_t req_stride;
};

inline constexpr int kMostWindowUnits = 8;
inline constexpr int kMostPlaces = 32766;  // place + 1 and 16 bits fit into an int32

// 8-bit copies of recent tokens (reference_recent.py): [num_places, num_kv_heads,
// copy_offsets().size] contiguous. Where there are none, `data` is null.
struct Copies {
  uint8_t* data = nullptr;
  // [num_units], 0 or (place + 1) << 16 | valid bits of the unit's tokens. A unit is slot / 16.
  const int32_t* unit_map = nullptr;
  int num_kv_heads = 0;
  int window_units = 0;  // of a request, counted from its end
  int64_t unit_bytes = 0;

  // Copies of the unit with this entry of the map, which is not 0.
  TQ_HOST_DEVICE uint8_t* unit(int32_t mapped, int64_t kv_head) const {
    return data + (((mapped >> 16) - 1) * int64_t{num_kv_heads} + kv_head) * unit_bytes;
  }
};

// First unit of the window of a request, counted in its own units.
TQ_HOST_DEVICE inline int first_window_unit(int seq_len, int window_units) {
  const int first = (seq_len + kUnitTokens - 1) / kUnitTokens - window_units;
  return first > 0 ? first : 0;
}

struct StoreParams {
  Rows key;    // [>= num_tokens, num_kv_heads, head_dim]
  Rows value;  // as key
  KeyFrame key_frame;
  Cache cache;
  const int64_t* slot_mapping;  // [num_tokens], negative = skip
  const int64_t* positions;     // [num_tokens]; null where the frame has no spans
  int64_t num_tokens;
  Copies copies;

  TQ_HOST_DEVICE int64_t position(int64_t token) const { return positions ? positions[token] : 0; }
};

inline constexpr int kNoSlidingWindow = 1 << 30;  // longer than any sequence

struct AttentionParams {
  Rows query;  // [>= num_tokens, num_heads, head_dim]
  Cache cache;
  BlockTable block_table;
  const int32_t* seq_lens;         // [num_reqs]
  const int32_t* query_start_loc;  // [num_reqs + 1]
  KeyFrame key_frame;
  float scale;
  bool causal;
  int sliding_window;  // at least 1
  MutableRows out;     // [>= num_tokens, num_heads, head_dim]
  float* lse;          // [num_heads, num_tokens]
  int64_t lse_stride;  // between heads
  int num_reqs;
  int num_heads;
  Copies copies;

  // A query token sees those of the request's tokens that are below this number, of these the last
  // sliding_window (reference.py: visible_tokens). May be negative, or past the request's tokens.
  TQ_HOST_DEVICE int sees_below(int seq_len, int query_len, int query_token) const {
    return seq_len + query_token + 1 - (causal ? query_len : 0);
  }
  TQ_HOST_DEVICE int first_seen(int seq_len, int query_len, int query_token) const {
    const int first = sees_below(seq_len, query_len, query_token) - sliding_window;
    return first > 0 ? first : 0;
  }
};

// Which units get a place among the copies; see reference_recent.assign.
struct AssignParams {
  BlockTable block_table;
  const int32_t* seq_lens;         // [num_reqs], after this step
  const int32_t* query_start_loc;  // [num_reqs + 1]
  int num_reqs;
  int units_per_block;
  int window_units;
  int32_t step;
  int32_t* unit_map;     // [num_units], as Copies
  int32_t (*places)[2];  // [num_places], unit or -1, last step that needed it
  int num_places;
  // [3 + num_places], next place to try, units in windows, how many have a place, working memory
  int32_t* clock;
};

struct DequantizeParams {
  Cache cache;
  BlockTable block_table;
  const int32_t* seq_starts;   // [num_reqs], first token to read
  const int32_t* cu_seq_lens;  // [num_reqs + 1], first row to write
  KeyFrame key_frame;
  MutableRows key;    // [cu_seq_lens[num_reqs], num_kv_heads, head_dim]
  MutableRows value;  // as key
  int num_reqs;
  Copies copies;  // read wherever they are valid, whatever the window
};

}  // namespace tq
