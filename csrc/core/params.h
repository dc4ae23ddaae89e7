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

// What the keys of every KV head are coded in (frame.py): [num_kv_heads, 3, head_dim] contiguous.
struct KeyFrame {
  const float* data;
  int head_dim;

  TQ_HOST_DEVICE const float* center(int64_t kv_head) const {
    return data + 3 * kv_head * head_dim;
  }
  TQ_HOST_DEVICE const float* sink(int64_t kv_head) const { return center(kv_head) + head_dim; }
  TQ_HOST_DEVICE const float* balance(int64_t kv_head) const { return sink(kv_head) + head_dim; }
};

struct BlockTable {
  const int32_t* data;  // [num_reqs, max_blocks]
  int64_t req_stride;
};

struct StoreParams {
  Rows key;    // [>= num_tokens, num_kv_heads, head_dim]
  Rows value;  // as key
  KeyFrame key_frame;
  Cache cache;
  const int64_t* slot_mapping;  // [num_tokens], negative = skip
  int64_t num_tokens;
};

struct AttentionParams {
  Rows query;  // [>= num_tokens, num_heads, head_dim]
  Cache cache;
  BlockTable block_table;
  const int32_t* seq_lens;         // [num_reqs]
  const int32_t* query_start_loc;  // [num_reqs + 1]
  KeyFrame key_frame;
  float scale;
  bool causal;
  MutableRows out;     // [>= num_tokens, num_heads, head_dim]
  float* lse;          // [num_heads, num_tokens]
  int64_t lse_stride;  // between heads
  int num_reqs;
  int num_heads;
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
};

}  // namespace tq
