// Entry points of the CPU kernels. Built once per instruction set; free of torch.
#pragma once

#include <cstdint>
#include <functional>

#include "core/params.h"

namespace tq::cpu {

// The caller's thread pool.
struct Threads {
  using Body = std::function<void(int64_t begin, int64_t end)>;

  int count;
  // Calls body(begin, end) for disjoint ranges that cover [0, count), each but the last of at least
  // `grain`. Waking threads costs more than a little work does, most of all where they have to wait
  // for a core.
  std::function<void(int64_t count, int64_t grain, const Body& body)> run;
};

void store(const StoreParams& params, const Threads& threads);
void paged_attention(const AttentionParams& params, const Threads& threads);
void dequantize(const DequantizeParams& params, const Threads& threads);
void assign_recent(const AssignParams& params);

}  // namespace tq::cpu
