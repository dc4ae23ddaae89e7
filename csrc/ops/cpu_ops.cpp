// CPU operators: validate, describe as plain parameters, run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "core/codebook.h"
#include "core/rotation.h"
#include "cpu/kernels.h"
#include "ops/check.h"

namespace tq::ops {
namespace {

cpu::Threads threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t count, int64_t grain, const cpu::Threads::Body& body) {
            if (count > 0) torch::stable::parallel_for(0, count, grain, body);
          }};
}

void store(const Tensor& key, const Tensor& value, const Tensor& center_, Tensor kv_cache,
           const Tensor& slot_mapping) {
  check_shape("key", key, {kAny, kAny, kAny});
  const int64_t num_kv_heads = key.size(1), head_dim = key.size(2);
  StoreParams p;
  p.cache = cache(kv_cache, head_dim);
  check_shape("kv_cache", kv_cache, {kAny, num_kv_heads, kAny, kAny});
  p.key = rows("key", key, num_kv_heads, head_dim);
  p.value = rows("value", value, num_kv_heads, head_dim);
  p.center = center(center_, num_kv_heads, head_dim);
  check_dtype("slot_mapping", slot_mapping, ScalarType::Long);
  check_shape("slot_mapping", slot_mapping, {kAny});
  check_contiguous("slot_mapping", slot_mapping);
  p.num_tokens = slot_mapping.size(0);
  p.slot_mapping = static_cast<const int64_t*>(slot_mapping.data_ptr());
  STD_TORCH_CHECK(key.size(0) >= p.num_tokens && value.size(0) >= p.num_tokens,
                  "key and value have ", key.size(0), " and ", value.size(0),
                  " rows, expected at least slot_mapping's ", p.num_tokens);
  const int64_t num_slots = p.cache.num_blocks * p.cache.block_size;
  for (int64_t i = 0; i < p.num_tokens; ++i) {
    STD_TORCH_CHECK(p.slot_mapping[i] < num_slots, "slot_mapping has slot ", p.slot_mapping[i],
                    ", kv_cache has ", num_slots, " slots");
  }
  cpu::store(p, threads());
}

void paged_attention(const Tensor& query, const Tensor& kv_cache, const Tensor& block_table_,
                     const Tensor& seq_lens, const Tensor& query_start_loc, const Tensor& center_,
                     double scale, bool causal, Tensor out, Tensor lse) {
  check_shape("query", query, {kAny, kAny, kAny});
  const int64_t num_tokens = query.size(0), num_heads = query.size(1), head_dim = query.size(2);
  AttentionParams p;
  p.cache = cache(kv_cache, head_dim);
  STD_TORCH_CHECK(num_heads % p.cache.num_kv_heads == 0, "query has ", num_heads,
                  " heads, expected a multiple of kv_cache's ", p.cache.num_kv_heads);
  p.query = rows("query", query, num_heads, head_dim);
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
  const int64_t last = p.query_start_loc[p.num_reqs];
  STD_TORCH_CHECK(last <= num_tokens && last <= out.size(0) && last <= lse.size(1),
                  "query_start_loc ends at row ", last, ", query, out and lse have ", num_tokens,
                  ", ", out.size(0), " and ", lse.size(1));
  const int64_t capacity = block_table_.size(1) * p.cache.block_size;
  for (int req = 0; req < p.num_reqs; ++req) {
    STD_TORCH_CHECK(p.seq_lens[req] <= capacity, "seq_lens has ", p.seq_lens[req],
                    " tokens, block_table has room for ", capacity);
  }
  cpu::paged_attention(p, threads());
}

void dequantize(const Tensor& kv_cache, const Tensor& block_table_, const Tensor& seq_starts,
                const Tensor& cu_seq_lens, const Tensor& center_, Tensor key_out,
                Tensor value_out) {
  check_shape("key_out", key_out, {kAny, kAny, kAny});
  const int64_t num_kv_heads = key_out.size(1), head_dim = key_out.size(2);
  DequantizeParams p;
  p.cache = cache(kv_cache, head_dim);
  check_shape("kv_cache", kv_cache, {kAny, num_kv_heads, kAny, kAny});
  p.num_reqs = static_cast<int>(seq_starts.size(0));
  p.block_table = block_table(block_table_, p.num_reqs);
  p.seq_starts = int_vector("seq_starts", seq_starts, p.num_reqs);
  p.cu_seq_lens = int_vector("cu_seq_lens", cu_seq_lens, p.num_reqs + 1);
  p.center = center(center_, num_kv_heads, head_dim);
  p.key = mutable_rows("key_out", key_out, num_kv_heads, head_dim);
  p.value = mutable_rows("value_out", value_out, num_kv_heads, head_dim);
  const int64_t num_rows = p.cu_seq_lens[p.num_reqs];
  STD_TORCH_CHECK(num_rows <= key_out.size(0) && num_rows <= value_out.size(0),
                  "cu_seq_lens ends at row ", num_rows, ", key_out and value_out have ",
                  key_out.size(0), " and ", value_out.size(0));
  const int64_t capacity = block_table_.size(1) * p.cache.block_size;
  for (int req = 0; req < p.num_reqs; ++req) {
    const int64_t end = p.seq_starts[req] + int64_t{p.cu_seq_lens[req + 1]} - p.cu_seq_lens[req];
    STD_TORCH_CHECK(p.seq_starts[req] >= 0 && end <= capacity, "seq_starts asks for tokens up to ",
                    end, ", block_table has room for ", capacity);
  }
  cpu::dequantize(p, threads());
}

template <int kGroup>
void fill_codebook(float* out) {
  using Book = Codebook<kGroup>;
  const float values[] = {Book::kInner,    Book::kOuter,     Book::kBoundary,
                          Book::kQjlScale, Book::kQjlWeight, Book::kRoot};
  std::copy(std::begin(values), std::end(values), out);
}

void format_constants(int64_t head_dim, int64_t block_size, Tensor offsets, Tensor codebook,
                      Tensor signs) {
  const SlotLayout layout{static_cast<int>(head_dim)};
  const BlockOffsets at = layout.offsets(block_size);
  check_shape("offsets", offsets, {6});
  check_dtype("offsets", offsets, ScalarType::Long);
  std::memcpy(offsets.data_ptr(), &at, sizeof at);
  check_shape("codebook", codebook, {6});
  check_dtype("codebook", codebook, ScalarType::Float);
  float* book = static_cast<float*>(codebook.data_ptr());
  layout.group() == 64 ? fill_codebook<64>(book) : fill_codebook<128>(book);
  check_shape("signs", signs, {3, kMaxGroup});
  check_dtype("signs", signs, ScalarType::Float);
  float* sign = static_cast<float*>(signs.data_ptr());
  for (const SignDiagonal& diagonal : {kKeySigns, kResidualSigns, kValueSigns}) {
    for (int j = 0; j < kMaxGroup; ++j) *sign++ = diagonal[j];
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(turboquant, CPU, m) {
  m.impl("store", TORCH_BOX(&store));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("format_constants", TORCH_BOX(&format_constants));
}

}  // namespace tq::ops
