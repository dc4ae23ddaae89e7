// Schemas of the operators; each device's library registers its kernels for them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(turboquant, m) {
  m.def(
      "store(Tensor key, Tensor value, Tensor key_frame, Tensor(a!) kv_cache, Tensor slot_mapping, "
      "Tensor(b!)? recent=None, Tensor? unit_map=None, Tensor? positions=None) -> ()");
  m.def(
      "paged_attention(Tensor query, Tensor(a!) kv_cache, Tensor block_table, Tensor seq_lens, "
      "Tensor query_start_loc, Tensor key_frame, float scale, bool causal, Tensor(b!) out, "
      "Tensor(c!) lse, Tensor(d!)? scratch=None, Tensor(e!)? tickets=None, "
      "Tensor(f!)? recent=None, Tensor? unit_map=None, int window_units=0, int sliding_window=0, "
      "Tensor? key=None, Tensor? value=None, Tensor? slot_mapping=None, "
      "Tensor? positions=None) -> ()");
  m.def(
      "assign_recent(Tensor block_table, Tensor seq_lens, Tensor query_start_loc, int block_size, "
      "int window_units, int step, Tensor(a!) unit_map, Tensor(b!) places, Tensor(c!) clock) -> "
      "()");
  m.def(
      "paged_attention_scratch_bytes(int num_reqs, int num_tokens, int num_heads, "
      "int num_kv_heads, int head_dim, int max_tokens) -> int");
  m.def(
      "dequantize(Tensor kv_cache, Tensor block_table, Tensor seq_starts, Tensor cu_seq_lens, "
      "Tensor key_frame, Tensor(a!) key_out, Tensor(b!) value_out, Tensor? recent=None, "
      "Tensor? unit_map=None) -> ()");
  // Fills tensors with what the kernels were compiled with, for a test that compares it with
  // Python.
  m.def(
      "format_constants(int head_dim, int block_size, Tensor(a!) offsets, Tensor(b!) codebook, "
      "Tensor(c!) signs) -> ()");
}
