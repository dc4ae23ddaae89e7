// Operator arguments to kernel parameters, with every check that does not depend on the device.
#pragma once

#include <algorithm>
#include <optional>

#include "ops/check.h"

namespace tq::ops {

inline int check_window_units(int64_t window_units) {
  STD_TORCH_CHECK(window_units >= 1 && window_units <= kMostWindowUnits, "window_units is ",
                  window_units, ", expected 1 to ", kMostWindowUnits);
  return static_cast<int>(window_units);
}

// Copies of recent tokens, if there are any.
inline Copies copies(const std::optional<Tensor>& recent, const std::optional<Tensor>& unit_map,
                     const Cache& cache) {
  STD_TORCH_CHECK(recent.has_value() == unit_map.has_value(),
                  "recent and unit_map must be given together");
  Copies c;
  if (!recent) return c;
  c.num_kv_heads = cache.num_kv_heads;
  c.unit_bytes = cache.layout.copy_offsets().size;
  check_dtype("recent", *recent, ScalarType::Byte);
  check_shape("recent", *recent, {kAny, cache.num_kv_heads, c.unit_bytes});
  check_contiguous("recent", *recent);
  c.data = static_cast<uint8_t*>(recent->data_ptr());
  c.unit_map = int_vector("unit_map", *unit_map, cache.num_blocks * cache.block_size / kUnitTokens);
  return c;
}

inline StoreParams store_params(const Tensor& key, const Tensor& value, const Tensor& key_frame_,
                                const Tensor& kv_cache, const Tensor& slot_mapping,
                                const std::optional<Tensor>& recent,
                                const std::optional<Tensor>& unit_map,
                                const std::optional<Tensor>& positions) {
  check_shape("key", key, {kAny, kAny, kAny});
  const int64_t num_kv_heads = key.size(1), head_dim = key.size(2);
  StoreParams p;
  p.cache = cache(kv_cache, head_dim);
  check_shape("kv_cache", kv_cache, {kAny, num_kv_heads, kAny, kAny});
  p.key = rows("key", key, num_kv_heads, head_dim);
  p.value = rows("value", value, num_kv_heads, head_dim);
  p.key_frame = key_frame(key_frame_, num_kv_heads, head_dim);
  p.slot_mapping = int64_vector("slot_mapping", slot_mapping, kAny);
  p.num_tokens = slot_mapping.size(0);
  STD_TORCH_CHECK(key.size(0) >= p.num_tokens && value.size(0) >= p.num_tokens,
                  "key and value have ", key.size(0), " and ", value.size(0),
                  " rows, expected at least slot_mapping's ", p.num_tokens);
  STD_TORCH_CHECK(positions || p.key_frame.num_spans == 0,
                  "positions must be given for a key_frame with ", p.key_frame.num_spans, " spans");
  p.positions = positions ? int64_vector("positions", *positions, kAny) : nullptr;
  STD_TORCH_CHECK(!positions || positions->size(0) >= p.num_tokens, "positions has ",
                  positions ? positions->size(0) : 0,
                  " elements, expected at least slot_mapping's ", p.num_tokens);
  p.copies = copies(recent, unit_map, p.cache);
  return p;
}

// Tokens that paged_attention stores first, if there are any.
inline std::optional<StoreParams> new_tokens(const std::optional<Tensor>& key,
                                             const std::optional<Tensor>& value,
                                             const Tensor& key_frame_, const Tensor& kv_cache,
                                             const std::optional<Tensor>& slot_mapping,
                                             const std::optional<Tensor>& recent,
                                             const std::optional<Tensor>& unit_map,
                                             const std::optional<Tensor>& positions) {
  STD_TORCH_CHECK(
      key.has_value() == value.has_value() && key.has_value() == slot_mapping.has_value(),
      "key, value and slot_mapping must be given together");
  if (!key) return std::nullopt;
  return store_params(*key, *value, key_frame_, kv_cache, *slot_mapping, recent, unit_map,
                      positions);
}

// 0 stands for no window.
inline int check_sliding_window(int64_t sliding_window) {
  STD_TORCH_CHECK(sliding_window >= 0, "sliding_window is ", sliding_window,
                  ", expected 0 for none or a positive number of tokens");
  const int64_t window = sliding_window == 0 ? kNoSlidingWindow : sliding_window;
  return static_cast<int>(std::min<int64_t>(window, kNoSlidingWindow));
}

inline AttentionParams attention_params(const Tensor& query, const Tensor& kv_cache,
                                        const Tensor& block_table_, const Tensor& seq_lens,
                                        const Tensor& query_start_loc, const Tensor& key_frame_,
                                        double scale, bool causal, const Tensor& out,
                                        const Tensor& lse, const std::optional<Tensor>& recent,
                                        const std::optional<Tensor>& unit_map, int64_t window_units,
                                        int64_t sliding_window) {
  check_shape("query", query, {kAny, kAny, kAny});
  const int64_t num_heads = query.size(1), head_dim = query.size(2);
  AttentionParams p;
  p.cache = cache(kv_cache, head_dim);
  STD_TORCH_CHECK(
      num_heads > 0 && p.cache.num_kv_heads > 0 && num_heads % p.cache.num_kv_heads == 0,
      "query has ", num_heads, " heads, expected a positive multiple of kv_cache's ",
      p.cache.num_kv_heads);
  p.query = rows("query", query, num_heads, head_dim);
  check_shape("seq_lens", seq_lens, {kAny});
  p.num_reqs = static_cast<int>(seq_lens.size(0));
  p.num_heads = static_cast<int>(num_heads);
  p.block_table = block_table(block_table_, p.num_reqs);
  p.seq_lens = int_vector("seq_lens", seq_lens, p.num_reqs);
  p.query_start_loc = int_vector("query_start_loc", query_start_loc, p.num_reqs + 1);
  p.key_frame = key_frame(key_frame_, p.cache.num_kv_heads, head_dim);
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  p.sliding_window = check_sliding_window(sliding_window);
  p.out = mutable_rows("out", out, num_heads, head_dim);
  check_dtype("lse", lse, ScalarType::Float);
  check_shape("lse", lse, {num_heads, kAny});
  STD_TORCH_CHECK(lse.stride(1) == 1, "lse has stride ", lse.stride(1),
                  " along tokens, expected 1");
  p.lse = static_cast<float*>(lse.data_ptr());
  p.lse_stride = lse.stride(0);
  p.copies = copies(recent, unit_map, p.cache);
  if (p.copies.data) p.copies.window_units = check_window_units(window_units);
  return p;
}

inline AssignParams assign_params(const Tensor& block_table_, const Tensor& seq_lens,
                                  const Tensor& query_start_loc, int64_t block_size,
                                  int64_t window_units, int64_t step, const Tensor& unit_map,
                                  const Tensor& places, const Tensor& clock) {
  check_shape("seq_lens", seq_lens, {kAny});
  AssignParams p;
  p.num_reqs = static_cast<int>(seq_lens.size(0));
  p.block_table = block_table(block_table_, p.num_reqs);
  p.seq_lens = int_vector("seq_lens", seq_lens, p.num_reqs);
  p.query_start_loc = int_vector("query_start_loc", query_start_loc, p.num_reqs + 1);
  STD_TORCH_CHECK(block_size > 0 && block_size % kUnitTokens == 0, "block_size is ", block_size,
                  ", expected a multiple of ", kUnitTokens);
  p.units_per_block = static_cast<int>(block_size / kUnitTokens);
  p.window_units = check_window_units(window_units);
  p.step = static_cast<int32_t>(step);
  p.unit_map = const_cast<int32_t*>(int_vector("unit_map", unit_map, unit_map.size(0)));
  check_dtype("places", places, ScalarType::Int);
  check_shape("places", places, {kAny, 2});
  check_contiguous("places", places);
  STD_TORCH_CHECK(places.size(0) > 0 && places.size(0) <= kMostPlaces, "places has ",
                  places.size(0), " rows, expected 1 to ", kMostPlaces);
  p.places = static_cast<int32_t (*)[2]>(places.data_ptr());
  p.num_places = static_cast<int>(places.size(0));
  p.clock = const_cast<int32_t*>(int_vector("clock", clock, 3 + p.num_places));
  return p;
}

inline DequantizeParams dequantize_params(const Tensor& kv_cache, const Tensor& block_table_,
                                          const Tensor& seq_starts, const Tensor& cu_seq_lens,
                                          const Tensor& key_frame_, const Tensor& key_out,
                                          const Tensor& value_out,
                                          const std::optional<Tensor>& recent,
                                          const std::optional<Tensor>& unit_map) {
  check_shape("key_out", key_out, {kAny, kAny, kAny});
  const int64_t num_kv_heads = key_out.size(1), head_dim = key_out.size(2);
  DequantizeParams p;
  p.cache = cache(kv_cache, head_dim);
  check_shape("kv_cache", kv_cache, {kAny, num_kv_heads, kAny, kAny});
  check_shape("seq_starts", seq_starts, {kAny});
  p.num_reqs = static_cast<int>(seq_starts.size(0));
  p.block_table = block_table(block_table_, p.num_reqs);
  p.seq_starts = int_vector("seq_starts", seq_starts, p.num_reqs);
  p.cu_seq_lens = int_vector("cu_seq_lens", cu_seq_lens, p.num_reqs + 1);
  p.key_frame = key_frame(key_frame_, num_kv_heads, head_dim);
  p.key = mutable_rows("key_out", key_out, num_kv_heads, head_dim);
  p.value = mutable_rows("value_out", value_out, num_kv_heads, head_dim);
  p.copies = copies(recent, unit_map, p.cache);
  return p;
}

}  // namespace tq::ops
