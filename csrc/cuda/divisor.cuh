// Division by a number that the whole launch shares.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace tq::cuda {

// A number, and what makes dividing by it a multiplication: an integer division takes over 100
// cycles, which a short kernel has no other work for. Granlund and Montgomery, "Division by
// Invariant Integers using Multiplication" (1994), figure 4.1: exact for 0 <= n < 2^31.
class Divisor {
 public:
  explicit Divisor(int value) : value_(value), shift_(0) {
    while ((int64_t{1} << shift_) < value) ++shift_;
    const uint64_t excess = (uint64_t{1} << shift_) - static_cast<uint64_t>(value);
    multiplier_ = static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(value) + 1);
  }

  TQ_HOST_DEVICE int value() const { return value_; }
  __device__ int divide(int n) const {
    const uint32_t dividend = n;
    return (__umulhi(dividend, multiplier_) + dividend) >> shift_;
  }

 private:
  int value_, shift_;
  uint32_t multiplier_;
};

}  // namespace tq::cuda
