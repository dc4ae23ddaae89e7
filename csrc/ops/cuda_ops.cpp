// CUDA operators: validate, describe as plain parameters, launch on the current stream.
//
// Values of device tensors (lengths, slots, blocks) are not checked: reading them would stop the
// device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "cuda/kernels.h"
#include "ops/params.h"

namespace tq::ops {
namespace {

// Makes the tensor's device current, as launches and the allocator need, and finds its stream.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& x) : guard_(x.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

void check_device(const char* name, const Tensor& x, const Tensor& expected) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == expected.get_device_index(), name,
                  " must be on the CUDA device of kv_cache");
}

void check_aligned(const Cache& cache) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(cache.data) % 16 == 0 &&
                      cache.block_stride_bytes % 16 == 0 && cache.head_stride_bytes % 16 == 0,
                  "kv_cache must start every (block, head) at a multiple of 16 bytes, has strides ",
                  cache.block_stride_bytes, " and ", cache.head_stride_bytes);
}

void check_copies(const std::optional<Tensor>& recent, const std::optional<Tensor>& unit_map,
                  const Tensor& kv_cache) {
  if (!recent) return;
  check_device("recent", *recent, kv_cache);
  check_device("unit_map", *unit_map, kv_cache);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(recent->data_ptr()) % 16 == 0,
                  "recent must be aligned to 16 bytes");
}

cuda::DecodeShape shape_of(const AttentionParams& p, int64_t num_tokens) {
  return {p.num_reqs, num_tokens, p.num_heads, p.cache.num_kv_heads, p.cache.layout.head_dim};
}

void store(const Tensor& key, const Tensor& value, const Tensor& key_frame, Tensor kv_cache,
           const Tensor& slot_mapping, std::optional<Tensor> recent, std::optional<Tensor> unit_map,
           std::optional<Tensor> positions) {
  const StoreParams p =
      store_params(key, value, key_frame, kv_cache, slot_mapping, recent, unit_map, positions);
  check_aligned(p.cache);
  check_device("key", key, kv_cache);
  check_device("value", value, kv_cache);
  check_device("key_frame", key_frame, kv_cache);
  check_device("slot_mapping", slot_mapping, kv_cache);
  if (positions) check_device("positions", *positions, kv_cache);
  check_copies(recent, unit_map, kv_cache);
  const DeviceScope scope(kv_cache);
  cuda::store(p, scope.stream());
}

void paged_attention(const Tensor& query, Tensor kv_cache, const Tensor& block_table,
                     const Tensor& seq_lens, const Tensor& query_start_loc, const Tensor& key_frame,
                     double scale, bool causal, Tensor out, Tensor lse,
                     std::optional<Tensor> scratch, std::optional<Tensor> tickets,
                     std::optional<Tensor> recent, std::optional<Tensor> unit_map,
                     int64_t window_units, int64_t sliding_window, std::optional<Tensor> key,
                     std::optional<Tensor> value, std::optional<Tensor> slot_mapping,
                     std::optional<Tensor> positions) {
  const AttentionParams p =
      attention_params(query, kv_cache, block_table, seq_lens, query_start_loc, key_frame, scale,
                       causal, out, lse, recent, unit_map, window_units, sliding_window);
  const int64_t num_tokens = query.size(0), head_dim = query.size(2);
  check_aligned(p.cache);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.key_frame.data) % 16 == 0,
                  "key_frame must be aligned to 16 bytes");
  STD_TORCH_CHECK(num_tokens <= out.size(0) && num_tokens <= lse.size(1), "query has ", num_tokens,
                  " rows, out and lse have ", out.size(0), " and ", lse.size(1));
  check_device("query", query, kv_cache);
  check_device("block_table", block_table, kv_cache);
  check_device("seq_lens", seq_lens, kv_cache);
  check_device("query_start_loc", query_start_loc, kv_cache);
  check_device("key_frame", key_frame, kv_cache);
  check_device("out", out, kv_cache);
  check_device("lse", lse, kv_cache);
  check_copies(recent, unit_map, kv_cache);
  const auto stored =
      new_tokens(key, value, key_frame, kv_cache, slot_mapping, recent, unit_map, positions);
  if (stored) {
    check_device("key", *key, kv_cache);
    check_device("value", *value, kv_cache);
    check_device("slot_mapping", *slot_mapping, kv_cache);
    if (positions) check_device("positions", *positions, kv_cache);
  }
  const DeviceScope scope(kv_cache);
  if (p.num_reqs == 0 || num_tokens == 0) {
    if (stored) cuda::store(*stored, scope.stream());
    return;
  }
  // What the rows of a request see together, if requests have equally many.
  const int64_t most_seen = p.sliding_window + num_tokens / p.num_reqs;
  const int64_t most_tokens = std::min(block_table.size(1) * p.cache.block_size, most_seen);
  const cuda::DecodePlan plan = cuda::plan_decode(shape_of(p, num_tokens), most_tokens);
  const int64_t num_rows = num_tokens * p.num_heads;
  const int64_t out_bytes = plan.num_splits * num_rows * head_dim * sizeof(float);
  const int64_t bytes = out_bytes + plan.num_splits * num_rows * sizeof(float);
  // Without scratch, the caching allocator's memory, which captured graphs keep.
  const Tensor memory =
      scratch ? *scratch : torch::stable::new_empty(query, {bytes}, ScalarType::Byte);
  check_dtype("scratch", memory, ScalarType::Byte);
  check_contiguous("scratch", memory);
  check_device("scratch", memory, kv_cache);
  STD_TORCH_CHECK(memory.numel() >= bytes, "scratch has ", memory.numel(), " bytes, expected ",
                  bytes, "; see paged_attention_scratch_bytes");
  auto* partial_out = static_cast<float*>(memory.data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(partial_out) % 16 == 0,
                  "scratch must be aligned to 16 bytes");
  const int64_t num_tickets = int64_t{p.num_reqs} * p.cache.num_kv_heads;
  const Tensor ticket =
      tickets ? *tickets : torch::stable::new_zeros(query, {num_tickets}, ScalarType::Int);
  check_dtype("tickets", ticket, ScalarType::Int);
  check_contiguous("tickets", ticket);
  check_device("tickets", ticket, kv_cache);
  STD_TORCH_CHECK(ticket.numel() >= num_tickets, "tickets has ", ticket.numel(),
                  " elements, expected ", num_tickets);
  cuda::paged_attention(p, plan,
                        {partial_out, partial_out + out_bytes / sizeof(float), num_rows,
                         static_cast<uint32_t*>(ticket.data_ptr())},
                        stored ? &*stored : nullptr, scope.stream());
}

int64_t paged_attention_scratch_bytes(int64_t num_reqs, int64_t num_tokens, int64_t num_heads,
                                      int64_t num_kv_heads, int64_t head_dim, int64_t max_tokens) {
  const cuda::DecodeShape shape{num_reqs, num_tokens, num_heads, num_kv_heads, head_dim};
  return cuda::most_splits(shape, max_tokens) * num_tokens * num_heads * (head_dim + 1) *
         sizeof(float);
}

void dequantize(const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_starts,
                const Tensor& cu_seq_lens, const Tensor& key_frame, Tensor key_out,
                Tensor value_out, std::optional<Tensor> recent, std::optional<Tensor> unit_map) {
  const DequantizeParams p = dequantize_params(kv_cache, block_table, seq_starts, cu_seq_lens,
                                               key_frame, key_out, value_out, recent, unit_map);
  check_aligned(p.cache);
  STD_TORCH_CHECK(key_out.size(0) == value_out.size(0), "key_out and value_out have ",
                  key_out.size(0), " and ", value_out.size(0), " rows, expected as many");
  check_device("block_table", block_table, kv_cache);
  check_device("seq_starts", seq_starts, kv_cache);
  check_device("cu_seq_lens", cu_seq_lens, kv_cache);
  check_device("key_frame", key_frame, kv_cache);
  check_device("key_out", key_out, kv_cache);
  check_device("value_out", value_out, kv_cache);
  check_copies(recent, unit_map, kv_cache);
  const DeviceScope scope(kv_cache);
  cuda::dequantize(p, key_out.size(0), scope.stream());
}

void assign_recent(const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc,
                   int64_t block_size, int64_t window_units, int64_t step, Tensor unit_map,
                   Tensor places, Tensor clock) {
  const AssignParams p = assign_params(block_table, seq_lens, query_start_loc, block_size,
                                       window_units, step, unit_map, places, clock);
  for (const auto& [name, x] : {std::pair{"block_table", &block_table},
                                {"seq_lens", &seq_lens},
                                {"query_start_loc", &query_start_loc},
                                {"places", &places},
                                {"clock", &clock}}) {
    STD_TORCH_CHECK(x->is_cuda() && x->get_device_index() == unit_map.get_device_index(), name,
                    " must be on the CUDA device of unit_map");
  }
  const DeviceScope scope(unit_map);
  cuda::assign_recent(p, scope.stream());
}

}  // namespace

// It has no tensor to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(turboquant, CompositeExplicitAutograd, m) {
  m.impl("paged_attention_scratch_bytes", TORCH_BOX(&paged_attention_scratch_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(turboquant, CUDA, m) {
  m.impl("store", TORCH_BOX(&store));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("assign_recent", TORCH_BOX(&assign_recent));
}

}  // namespace tq::ops
