// Reading the codes of sixteen consecutive tokens, one per lane, out of a block region.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/params.h"
#include "core/rotation.h"
#include "cpu/simd.h"

namespace tq::cpu {

// Sixteen tokens that start at a multiple of sixteen, so they lie in one block. Lanes past the end
// of a sequence hold whatever the cache holds there; callers mask them.
struct Unit {
  const uint8_t* region;  // of (block, KV head)
  int offset;             // of the first token in the block
};

inline Unit locate(const Cache& cache, const int32_t* blocks, int64_t kv_head, int64_t token) {
  return {cache.region(blocks[token / cache.block_size], kv_head),
          static_cast<int>(token % cache.block_size)};
}

// Loads blocks of a sequence into the second-level cache ahead of their use, a few lines at a time
// between other work: blocks lie anywhere in the pool, so the hardware cannot guess the next one,
// and more loads at once than it can track would stall.
class Prefetch {
 public:
  // From the block of `token` on, `lines` cache lines a step.
  void start(const Cache& cache, const int32_t* blocks, int64_t kv_head, int64_t token, int lines) {
    cache_ = &cache, blocks_ = blocks, kv_head_ = kv_head, lines_ = lines;
    block_ = end_block_ = token / cache.block_size;
    left_bytes_ = 0;
  }
  // Allow loads up to a token.
  void allow(int64_t token) { end_block_ = (token + cache_->block_size - 1) / cache_->block_size; }
  void step() {
    for (int i = 0; i < lines_; ++i, line_ += 64, left_bytes_ -= 64) {
      if (left_bytes_ <= 0) {
        if (block_ >= end_block_) return;
        line_ = cache_->region(blocks_[block_++], kv_head_);
        left_bytes_ = cache_->layout.slot_bytes() * cache_->block_size;
      }
      __builtin_prefetch(line_, 0, 2);
    }
  }

 private:
  const Cache* cache_;
  const int32_t* blocks_;
  int lines_;
  int64_t kv_head_, block_, end_block_, left_bytes_;
  const uint8_t* line_;
};

// Transpose `count` consecutive 32-bit words of each token into words[count]; `at` is the offset of
// the first word of token 0 of the block, tokens are `stride_bytes` apart.
inline void load_words(const Unit& unit, int64_t at, int stride_bytes, int count, Words* words) {
  alignas(64) uint32_t transposed[kMaxGroup / 16][kLanes];
  const uint8_t* token = unit.region + at + int64_t{unit.offset} * stride_bytes;
  for (int i = 0; i < kLanes; ++i, token += stride_bytes) {
    for (int w = 0; w < count; ++w) std::memcpy(&transposed[w][i], token + w * 4, 4);
  }
  for (int w = 0; w < count; ++w) words[w] = load(transposed[w]);
}

// Scales of group `g`; `at` is the offset of the scale array.
inline Lanes load_scales(const Unit& unit, int64_t at, int g, int block_size) {
  uint16_t scale[kLanes];
  std::memcpy(scale, unit.region + at + (int64_t{g} * block_size + unit.offset) * kScaleBytes,
              sizeof scale);
  return load_half(scale);
}

// Key codes of one group: indices, 16 a word, and signs, 32 a word.
template <int kGroup>
struct KeyWords {
  Words index[kGroup / 16];
  Words sign[kGroup / 32];

  KeyWords() = default;
  KeyWords(const Unit& unit, const SlotLayout& layout, const BlockOffsets& at, int g) {
    load_words(unit, at.key_index + g * kGroup / 4, layout.index_bytes(), kGroup / 16, index);
    load_words(unit, at.key_sign + g * kGroup / 8, layout.sign_bytes(), kGroup / 32, sign);
  }

  // u^ = C[i] + rho (H D2)^T s: the normalized keys in the space of q1, as key[kGroup].
  void decode(Lanes* key) const {
    for (int j = 0; j < kGroup; ++j) {
      key[j] = add_where_bit(splat(-1.0f), sign[j / 32], j % 32, splat(2.0f));
    }
    hadamard<kGroup>(key);
    for (int j = 0; j < kGroup; ++j) {
      key[j] = fma(splat(Codebook<kGroup>::kQjlWeight * kResidualSigns[j]), key[j],
                   centroid<kGroup>(index[j / 16] >> (2 * (j % 16))));
    }
  }
};

}  // namespace tq::cpu
