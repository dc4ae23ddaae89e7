// Sign diagonals of the rotations and the order of the Hadamard butterflies.
//
// Mirrors vllm_turboquant/rotation.py; a test compares the diagonals.
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "core/macros.h"

namespace tq {

// Bit j % 64 of word j / 64 is set where the diagonal is +1 at coordinate j.
struct SignDiagonal {
  uint64_t words[kMaxGroup / 64];

  TQ_HOST_DEVICE constexpr float operator[](int j) const {
    return (words[j / 64] >> (j % 64)) & 1 ? 1.0f : -1.0f;
  }
};

inline constexpr SignDiagonal kKeySigns{{0x6a7ca8862cc9860e, 0x04ef5da78235350e}};       // D1
inline constexpr SignDiagonal kResidualSigns{{0xfb30eff09dced6df, 0xcaa1661a33ce8266}};  // D2
inline constexpr SignDiagonal kValueSigns{{0x6b563e17c748a7dd, 0xbd3614c9fafa9085}};     // D3

// Multiply x[kSize] in place by the unnormalized Hadamard matrix, largest stride first. T is a
// float or a vector of floats, each lane a transform of its own.
template <int kSize, typename T>
TQ_HOST_DEVICE inline void hadamard(T* x) {
  for (int stride = kSize / 2; stride > 0; stride /= 2) {
    for (int start = 0; start < kSize; start += 2 * stride) {
      for (int j = start; j < start + stride; ++j) {
        const T a = x[j], b = x[j + stride];
        x[j] = a + b;
        x[j + stride] = a - b;
      }
    }
  }
}

}  // namespace tq
