// Entry points of the CUDA kernels; plain parameters in, launches on a stream out.
//
// None of them synchronizes or reads device memory from the host, so all can be captured in a CUDA
// graph.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace tq::cuda {

using Stream = void*;  // cudaStream_t, so that callers need no CUDA header

// begins_next: The next launch on the stream may overlap this one. It has to await it before it
// reads what this one writes.
void store(const StoreParams& p, Stream stream, bool begins_next = false);
int64_t store_ctas(const StoreParams& p);

// One CTA, so that places are given in the order of requests.
void assign_recent(const AssignParams& p, Stream stream);

// How paged_attention divides its work. Depends on sizes that the host knows, never on lengths.
struct DecodePlan {
  int rows;        // query rows of a KV head that share one pass over the tokens, 1 to 8
  bool wide;       // few CTAs with many warps, or many with few
  int num_splits;  // parts that the tokens of a request are divided into
};

struct DecodeShape {
  int64_t num_reqs, num_tokens, num_heads, num_kv_heads, head_dim;
};

// max_tokens: how many cached tokens of a request are read, at most.
DecodePlan plan_decode(const DecodeShape& shape, int64_t max_tokens);

// Upper bound of num_splits of any plan for the shape and at most so many tokens of a request.
int64_t most_splits(const DecodeShape& shape, int64_t max_tokens);

// Partial results, one of every split, and who is done with them.
struct Partials {
  float* out;         // [num_splits, num_rows, head_dim], normalized, values still rotated
  float* lse;         // [num_splits, num_rows], natural logarithm; -inf where nothing is seen
  int64_t num_rows;   // num_tokens * num_heads
  uint32_t* tickets;  // [num_reqs, num_kv_heads], all 0 before and after; of one launch at a time
};

// new_tokens: stored first, where they are not null.
void paged_attention(const AttentionParams& p, const DecodePlan& plan, const Partials& partials,
                     const StoreParams* new_tokens, Stream stream);

// num_rows: rows that key and value have room for.
void dequantize(const DequantizeParams& p, int64_t num_rows, Stream stream);

}  // namespace tq::cuda
