// Paged dequantize: reconstruct keys and values of a bounded range of tokens.
//
// Work items: units of sixteen tokens of one KV head, tokens in lanes.
// k = o + alpha B^-1 (H D1)^T u^,  v = beta (H D3)^T C[i]   (reference.py: decode_keys,
// decode_values)
// Of a token that has an 8-bit copy, its codes and scale take the place of u^ or C[i] and of alpha
// or beta (reference_recent.py: read).
#include <algorithm>
#include <vector>

#include "cpu/codes.h"
#include "cpu/copies.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace tq::cpu {
namespace {

// Up to sixteen tokens of one request, starting at a multiple of sixteen.
struct UnitPart {
  int req;
  int64_t unit_token;  // first token of the unit
  int first, last;     // lanes to write
  int64_t row;         // that lane `first` goes to
};

// Finish the inverse rotation of x[kGroup] and write the wanted lanes, changed by map(lane, row).
template <int kGroup, typename Map>
void write_lanes(const Lanes* x, const SignDiagonal& signs, const Lanes& scale,
                 const UnitPart& part, int kv_head, int g, const MutableRows& rows,
                 const Map& map) {
  alignas(64) float transposed[kGroup][kLanes];
  for (int j = 0; j < kGroup; ++j) {
    store(transposed[j], x[j] * (scale * splat(signs[j] / Codebook<kGroup>::kRoot)));
  }
  float row[kGroup];
  for (int lane = part.first; lane < part.last; ++lane) {
    for (int j = 0; j < kGroup; ++j) row[j] = transposed[j][lane];
    map(lane, row);
    write_row(rows, part.row + lane - part.first, kv_head, g * kGroup, kGroup, row);
  }
}

// The copies of the tokens in part of a unit.
struct UnitCopies {
  CopiedToken tokens[kLanes];
  int count = 0;

  UnitCopies(const DequantizeParams& p, const UnitPart& part, const int32_t* blocks, int kv_head) {
    if (!p.copies.data) return;
    const int64_t block = blocks[part.unit_token / p.cache.block_size];
    const int64_t slot = block * p.cache.block_size + part.unit_token % p.cache.block_size;
    const int32_t mapped = p.copies.unit_map[slot / kUnitTokens];
    for (int lane = part.first; lane < part.last; ++lane) {
      if (mapped >> lane & 1) tokens[count++] = {lane, p.copies.unit(mapped, kv_head), lane};
    }
  }

  // Replace what came of codes in their lanes: x[kGroup], still rotated, and its scale.
  template <int kGroup>
  void replace(const SlotLayout& layout, int64_t codes, int64_t scales, int g, Lanes* x,
               Lanes* scale) const {
    if (count == 0) return;
    float lanes[kLanes];
    for (int j = 0; j < kGroup; ++j) {
      store(lanes, x[j]);
      for (int i = 0; i < count; ++i) {
        lanes[tokens[i].index] = tokens[i].codes<kGroup>(layout, codes, g)[j];
      }
      x[j] = load(lanes);
    }
    store(lanes, *scale);
    for (int i = 0; i < count; ++i) lanes[tokens[i].index] = tokens[i].scale(scales, g);
    *scale = load(lanes);
  }
};

template <int kGroup>
void dequantize_unit(const DequantizeParams& p, const UnitPart& part, int kv_head) {
  const SlotLayout layout = p.cache.layout;
  const BlockOffsets at = layout.offsets(p.cache.block_size);
  const CopyOffsets copy_at = layout.copy_offsets();
  const int32_t* blocks = p.block_table.data + part.req * p.block_table.req_stride;
  const Unit unit = locate(p.cache, blocks, kv_head, part.unit_token);
  const UnitCopies copies(p, part, blocks, kv_head);
  static_assert(kSpanTokens % kUnitTokens == 0, "keys of a unit have one center");
  const float* near = p.key_frame.near(kv_head, part.unit_token);
  Lanes x[kGroup];
  for (int g = 0; g < layout.num_groups(); ++g) {
    KeyWords<kGroup>(unit, layout, at, g).decode(x);
    Lanes key_scale = load_scales(unit, at.key_scale, g, p.cache.block_size);
    copies.replace<kGroup>(layout, copy_at.key, copy_at.key_scale, g, x, &key_scale);
    hadamard<kGroup>(x);
    const Words scale = as_words(key_scale);
    uint32_t at_sink[kLanes];
    store(at_sink, scale >> 31);
    const auto leave_frame = [&](int lane, float* row) {
      const KeyFrame& frame = p.key_frame;
      const float* origin = at_sink[lane] ? frame.sink(kv_head) : near;
      const float* balance = frame.balance(kv_head);
      for (int j = 0; j < kGroup; ++j) {
        row[j] = row[j] / balance[g * kGroup + j] + origin[g * kGroup + j];
      }
    };
    write_lanes<kGroup>(x, kKeySigns, as_lanes(scale & splat(0x7fffffffu)), part, kv_head, g, p.key,
                        leave_frame);
    Words index[kGroup / 16];
    load_words(unit, at.value_index + g * kGroup / 4, layout.index_bytes(), kGroup / 16, index);
    for (int j = 0; j < kGroup; ++j) x[j] = centroid<kGroup>(index[j / 16] >> (2 * (j % 16)));
    Lanes value_scale = load_scales(unit, at.value_scale, g, p.cache.block_size);
    copies.replace<kGroup>(layout, copy_at.value, copy_at.value_scale, g, x, &value_scale);
    hadamard<kGroup>(x);
    write_lanes<kGroup>(x, kValueSigns, value_scale, part, kv_head, g, p.value, [](int, float*) {});
  }
}

std::vector<UnitPart> plan(const DequantizeParams& p) {
  std::vector<UnitPart> parts;
  for (int req = 0; req < p.num_reqs; ++req) {
    const int64_t row = p.cu_seq_lens[req], begin = p.seq_starts[req];
    const int64_t end = begin + p.cu_seq_lens[req + 1] - row;
    for (int64_t unit = begin / kLanes * kLanes; unit < end; unit += kLanes) {
      const int64_t first = std::max(unit, begin), last = std::min(unit + kLanes, end);
      parts.push_back({req, unit, static_cast<int>(first - unit), static_cast<int>(last - unit),
                       row + first - begin});
    }
  }
  return parts;
}

}  // namespace

void dequantize(const DequantizeParams& p, const Threads& threads) {
  const std::vector<UnitPart> parts = plan(p);
  const int num_heads = p.cache.num_kv_heads;
  threads.run(static_cast<int64_t>(parts.size()) * num_heads, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const UnitPart& part = parts[i / num_heads];
      const int kv_head = static_cast<int>(i % num_heads);
      if (p.cache.layout.group() == 64) {
        dequantize_unit<64>(p, part, kv_head);
      } else {
        dequantize_unit<128>(p, part, kv_head);
      }
    }
  });
}

}  // namespace tq::cpu
