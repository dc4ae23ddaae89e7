// Operators torch.ops.turboquant_emulated.*: the launches of csrc/cuda over CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <optional>
#include <vector>

#include "cuda/kernels.h"
#include "ops/params.h"

#define turboquant turboquant_emulated
#include "ops/schema.cpp"

namespace tq::ops {
namespace {

void store(const Tensor& key, const Tensor& value, const Tensor& key_frame, Tensor kv_cache,
           const Tensor& slot_mapping, std::optional<Tensor> recent, std::optional<Tensor> unit_map,
           std::optional<Tensor> positions) {
  cuda::store(
      store_params(key, value, key_frame, kv_cache, slot_mapping, recent, unit_map, positions),
      nullptr);
  emulator::finish();
}

void paged_attention(const Tensor& query, Tensor kv_cache, const Tensor& block_table,
                     const Tensor& seq_lens, const Tensor& query_start_loc, const Tensor& key_frame,
                     double scale, bool causal, Tensor out, Tensor lse,
                     std::optional<Tensor> /* scratch */, std::optional<Tensor> /* tickets */,
                     std::optional<Tensor> recent, std::optional<Tensor> unit_map,
                     int64_t window_units, int64_t sliding_window, std::optional<Tensor> key,
                     std::optional<Tensor> value, std::optional<Tensor> slot_mapping,
                     std::optional<Tensor> positions) {
  const AttentionParams p =
      attention_params(query, kv_cache, block_table, seq_lens, query_start_loc, key_frame, scale,
                       causal, out, lse, recent, unit_map, window_units, sliding_window);
  const int64_t num_tokens = query.size(0), num_rows = num_tokens * p.num_heads;
  const cuda::DecodeShape shape{p.num_reqs, num_tokens, p.num_heads, p.cache.num_kv_heads,
                                p.cache.layout.head_dim};
  const cuda::DecodePlan plan = cuda::plan_decode(shape, block_table.size(1) * p.cache.block_size);
  const float poison = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> partial_out(plan.num_splits * num_rows * query.size(2), poison);
  std::vector<float> partial_lse(plan.num_splits * num_rows, poison);
  std::vector<uint32_t> tickets(p.num_reqs * p.cache.num_kv_heads);
  const auto stored =
      new_tokens(key, value, key_frame, kv_cache, slot_mapping, recent, unit_map, positions);
  cuda::paged_attention(p, plan, {partial_out.data(), partial_lse.data(), num_rows, tickets.data()},
                        stored ? &*stored : nullptr, nullptr);
  emulator::finish();
  for (const uint32_t ticket : tickets) STD_TORCH_CHECK(ticket == 0, "a ticket is left");
}

void dequantize(const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_starts,
                const Tensor& cu_seq_lens, const Tensor& key_frame, Tensor key_out,
                Tensor value_out, std::optional<Tensor> recent, std::optional<Tensor> unit_map) {
  cuda::dequantize(dequantize_params(kv_cache, block_table, seq_starts, cu_seq_lens, key_frame,
                                     key_out, value_out, recent, unit_map),
                   key_out.size(0), nullptr);
  emulator::finish();
}

void assign_recent(const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc,
                   int64_t block_size, int64_t window_units, int64_t step, Tensor unit_map,
                   Tensor places, Tensor clock) {
  cuda::assign_recent(assign_params(block_table, seq_lens, query_start_loc, block_size,
                                    window_units, step, unit_map, places, clock),
                      nullptr);
  emulator::finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(turboquant, CPU, m) {
  m.impl("store", TORCH_BOX(&store));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("assign_recent", TORCH_BOX(&assign_recent));
}

}  // namespace tq::ops
