// CPU operators: validate, describe as plain parameters, run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "core/codebook.h"
#include "core/rotation.h"
#include "cpu/kernels.h"
#include "ops/params.h"

namespace tq::ops {
namespace {

cpu::Threads threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t count, int64_t grain, const cpu::Threads::Body& body) {
            if (count > 0) torch::stable::parallel_for(0, count, grain, body);
          }};
}

void store_tokens(const StoreParams& p) {
  const int64_t num_slots = p.cache.num_blocks * p.cache.block_size;
  for (int64_t i = 0; i < p.num_tokens; ++i) {
    STD_TORCH_CHECK(p.slot_mapping[i] < num_slots, "slot_mapping has slot ", p.slot_mapping[i],
                    ", kv_cache has ", num_slots, " slots");
  }
  cpu::store(p, threads());
}

void store(const Tensor& key, const Tensor& value, const Tensor& key_frame, Tensor kv_cache,
           const Tensor& slot_mapping, std::optional<Tensor> recent, std::optional<Tensor> unit_map,
           std::optional<Tensor> positions) {
  store_tokens(
      store_params(key, value, key_frame, kv_cache, slot_mapping, recent, unit_map, positions));
}

void paged_attention(const Tensor& query, Tensor kv_cache, const Tensor& block_table,
                     const Tensor& seq_lens, const Tensor& query_start_loc, const Tensor& key_frame,
                     double scale, bool causal, Tensor out, Tensor lse,
                     std::optional<Tensor> /* scratch: threads have their own */,
                     std::optional<Tensor> /* tickets */, std::optional<Tensor> recent,
                     std::optional<Tensor> unit_map, int64_t window_units, int64_t sliding_window,
                     std::optional<Tensor> key, std::optional<Tensor> value,
                     std::optional<Tensor> slot_mapping, std::optional<Tensor> positions) {
  const AttentionParams p =
      attention_params(query, kv_cache, block_table, seq_lens, query_start_loc, key_frame, scale,
                       causal, out, lse, recent, unit_map, window_units, sliding_window);
  const int64_t last = p.query_start_loc[p.num_reqs];
  STD_TORCH_CHECK(last <= query.size(0) && last <= out.size(0) && last <= lse.size(1),
                  "query_start_loc ends at row ", last, ", query, out and lse have ", query.size(0),
                  ", ", out.size(0), " and ", lse.size(1));
  const int64_t capacity = block_table.size(1) * p.cache.block_size;
  for (int req = 0; req < p.num_reqs; ++req) {
    STD_TORCH_CHECK(p.seq_lens[req] <= capacity, "seq_lens has ", p.seq_lens[req],
                    " tokens, block_table has room for ", capacity);
  }
  const auto stored =
      new_tokens(key, value, key_frame, kv_cache, slot_mapping, recent, unit_map, positions);
  if (stored) store_tokens(*stored);
  cpu::paged_attention(p, threads());
}

void dequantize(const Tensor& kv_cache, const Tensor& block_table, const Tensor& seq_starts,
                const Tensor& cu_seq_lens, const Tensor& key_frame, Tensor key_out,
                Tensor value_out, std::optional<Tensor> recent, std::optional<Tensor> unit_map) {
  const DequantizeParams p = dequantize_params(kv_cache, block_table, seq_starts, cu_seq_lens,
                                               key_frame, key_out, value_out, recent, unit_map);
  const int64_t num_rows = p.cu_seq_lens[p.num_reqs];
  STD_TORCH_CHECK(num_rows <= key_out.size(0) && num_rows <= value_out.size(0),
                  "cu_seq_lens ends at row ", num_rows, ", key_out and value_out have ",
                  key_out.size(0), " and ", value_out.size(0));
  const int64_t capacity = block_table.size(1) * p.cache.block_size;
  for (int req = 0; req < p.num_reqs; ++req) {
    const int64_t end = p.seq_starts[req] + int64_t{p.cu_seq_lens[req + 1]} - p.cu_seq_lens[req];
    STD_TORCH_CHECK(p.seq_starts[req] >= 0 && end <= capacity, "seq_starts asks for tokens up to ",
                    end, ", block_table has room for ", capacity);
  }
  cpu::dequantize(p, threads());
}

void assign_recent(const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start_loc,
                   int64_t block_size, int64_t window_units, int64_t step, Tensor unit_map,
                   Tensor places, Tensor clock) {
  const AssignParams p = assign_params(block_table, seq_lens, query_start_loc, block_size,
                                       window_units, step, unit_map, places, clock);
  const int64_t capacity = block_table.size(1) * block_size;
  for (int req = 0; req < p.num_reqs; ++req) {
    STD_TORCH_CHECK(p.seq_lens[req] <= capacity, "seq_lens has ", p.seq_lens[req],
                    " tokens, block_table has room for ", capacity);
  }
  cpu::assign_recent(p);
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
  m.impl("assign_recent", TORCH_BOX(&assign_recent));
  m.impl("format_constants", TORCH_BOX(&format_constants));
}

}  // namespace tq::ops
