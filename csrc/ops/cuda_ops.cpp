// CUDA operators: validate, describe as plain parameters, launch on the current stream.
//
// Values of device tensors (lengths, slots, blocks) are not checked: reading them would stop the
// device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/kernels.h"
#include "ops/check.h"

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

Cache cuda_cache(const Tensor& x, int64_t head_dim) {
  const Cache result = cache(x, head_dim);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(result.data) % 16 == 0 &&
                      result.block_stride_bytes % 16 == 0 && result.head_stride_bytes % 16 == 0,
                  "kv_cache must start every (block, head) at a multiple of 16 bytes, has strides ",
                  result.block_stride_bytes, " and ", result.head_stride_bytes);
  return result;
}

void store(const Tensor& key, const Tensor& value, const Tensor& center_, Tensor kv_cache,
           const Tensor& slot_mapping) {
  check_shape("key", key, {kAny, kAny, kAny});
  const int64_t num_kv_heads = key.size(1), head_dim = key.size(2);
  StoreParams p;
  p.cache = cuda_cache(kv_cache, head_dim);
  check_shape("kv_cache", kv_cache, {kAny, num_kv_heads, kAny, kAny});
  p.key = rows("key", key, num_kv_heads, head_dim);
  p.value = rows("value", value, num_kv_heads, head_dim);
  p.center = center(center_, num_kv_heads, head_dim);
  check_dtype("slot_mapping", slot_mapping, ScalarType::Long);
  check_shape("slot_mapping", slot_mapping, {kAny});
  check_contiguous("slot_mapping", slot_mapping);
  check_device("key", key, kv_cache);
  check_device("value", value, kv_cache);
  check_device("center", center_, kv_cache);
  check_device("slot_mapping", slot_mapping, kv_cache);
  p.num_tokens = slot_mapping.size(0);
  p.slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr());
  STD_TORCH_CHECK(key.size(0) >= p.num_tokens && value.size(0) >= p.num_tokens,
                  "key and value have ", key.size(0), " and ", value.size(0),
                  " rows, expected at least slot_mapping's ", p.num_tokens);
  const DeviceScope scope(kv_cache);
  cuda::store(p, scope.stream());
}

void paged_attention(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table_,
                     const Tensor& seq_lens, const Tensor& query_start_loc, const Tensor& center_,
                     double scale, bool causal, Tensor out, Tensor lse) {
  check_shape("query", query, {kAny, kAny, kAny});
  const int64_t num_tokens = query.size(0), num_heads = query.size(1), head_dim = query.size(2);
  AttentionParams p;
  p.cache = cuda_cache(kv_cache, head_dim);
  STD_TORCH_CHECK(num_heads % p.cache.num_kv_heads == 0, "query has ", num_heads,
                  " heads, expected a multiple of kv_cache's ", p.cache.num_kv_heads);
  p.query = rows("query", query, num_heads, head_dim);
  check_shape("seq_lens", seq_lens, {kAny});
  p.num_reqs = static_cast<int>(seq_lens.size(0));
  p.num_heads = static_cast<int>(num_heads);
  p.block_table = block_table(block_table_, p.num_reqs);
  p.seq_lens = int_vector("seq_lens", seq_lens, p.num_reqs);
  p.query_start_loc = int_vector("query_start_loc", query_start_loc, p.num_reqs + 1);
  p.center = center(center_, p.cache.num_kv_heads, head_dim);
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  p.out = mutable_rows("out", out, num_heads, head_dim);
  check_dtype("lse", lse, ScalarType::Float);
  check_shape("lse", lse, {num_heads, kAny});
  STD_TORCH_CHECK(lse.stride(1) == 1, "lse has stride ", lse.stride(1),
                  " along tokens, expected 1");
  p.lse = static_cast<float*>(lse.data_ptr());
  p.lse_stride = lse.stride(0);
  STD_TORCH_CHECK(num_tokens <= out.size(0) && num_tokens <= lse.size(1), "query has ", num_tokens,
                  " rows, out and lse have ", out.size(0), " and ", lse.size(1));
  check_device("query", query, kv_cache);
  check_device("block_table", block_table_, kv_cache);
  check_device("seq_lens", seq_lens, kv_cache);
  check_device("query_start_loc", query_start_loc, kv_cache);
  check_device("center", center_, kv_cache);
  check_device("out", out, kv_cache);
  check_device("lse", lse, kv_cache);
  if (p.num_reqs == 0 || num_tokens == 0) return;
  const DeviceScope scope(kv_cache);
  const cuda::DecodePlan plan =
      cuda::plan_decode(p, num_tokens, block_table_.size(1) * p.cache.block_size);
  const int64_t num_rows = num_tokens * num_heads;
  // The caching allocator serves captured graphs, and keeps this memory for the stream that uses
  // it.
  const Tensor partial_out =
      torch::stable::new_empty(query, {plan.num_splits, num_rows, head_dim}, ScalarType::Float);
  const Tensor partial_lse =
      torch::stable::new_empty(query, {plan.num_splits, num_rows}, ScalarType::Float);
  cuda::paged_attention(p, plan,
                        {static_cast<float*>(partial_out.data_ptr()),
                         static_cast<float*>(partial_lse.data_ptr()), num_rows},
                        scope.stream());
}

void dequantize(const Tensor& kv_cache, const Tensor& block_table_, const Tensor& seq_starts,
                const Tensor& cu_seq_lens, const Tensor& center_, Tensor key_out,
                Tensor value_out) {
  check_shape("key_out", key_out, {kAny, kAny, kAny});
  const int64_t num_kv_heads = key_out.size(1), head_dim = key_out.size(2);
  DequantizeParams p;
  p.cache = cuda_cache(kv_cache, head_dim);
  check_shape("kv_cache", kv_cache, {kAny, num_kv_heads, kAny, kAny});
  check_shape("seq_starts", seq_starts, {kAny});
  p.num_reqs = static_cast<int>(seq_starts.size(0));
  p.block_table = block_table(block_table_, p.num_reqs);
  p.seq_starts = int_vector("seq_starts", seq_starts, p.num_reqs);
  p.cu_seq_lens = int_vector("cu_seq_lens", cu_seq_lens, p.num_reqs + 1);
  p.center = center(center_, num_kv_heads, head_dim);
  p.key = mutable_rows("key_out", key_out, num_kv_heads, head_dim);
  p.value = mutable_rows("value_out", value_out, num_kv_heads, head_dim);
  STD_TORCH_CHECK(key_out.size(0) == value_out.size(0), "key_out and value_out have ",
                  key_out.size(0), " and ", value_out.size(0), " rows, expected as many");
  check_device("block_table", block_table_, kv_cache);
  check_device("seq_starts", seq_starts, kv_cache);
  check_device("cu_seq_lens", cu_seq_lens, kv_cache);
  check_device("center", center_, kv_cache);
  check_device("key_out", key_out, kv_cache);
  check_device("value_out", value_out, kv_cache);
  const DeviceScope scope(kv_cache);
  cuda::dequantize(p, key_out.size(0), scope.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(turboquant, CUDA, m) {
  m.impl("store", TORCH_BOX(&store));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}

}  // namespace tq::ops
