// Entry points of the CPU kernels. Built once per instruction set; free of torch.
#pragma once

#include <cstdint>
#include <functional>

#include "core/params.h"

namespace tq::cpu {

// The caller's thread pool: calls body(begin, end) for disjoint ranges that cover [0, count).
struct Threads {
  int count;
  std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body)>
      run;
};

void store(const StoreParams& params, const Threads& threads);
void paged_attention(const AttentionParams& params, const Threads& threads);
void dequantize(const DequantizeParams& params, const Threads& threads);

}  // namespace tq::cpu
