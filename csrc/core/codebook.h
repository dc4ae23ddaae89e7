// Lloyd-Max codebook of a rotated coordinate, 2 bits.
//
// Solved by vllm_turboquant/codebook.py (arXiv 2504.19874, Lemma 1) and pinned here; a test
// compares.
#pragma once

namespace tq {

// kInner < kOuter: levels in the order of the index are -kOuter, -kInner, kInner, kOuter.
// kBoundary: midpoint of the two. kQjlScale: rho, the size that a residual sign stands for.
// kQjlWeight: rho / sqrt(kGroup). kRoot: sqrt(kGroup).
template <int kGroup>
struct Codebook;

template <>
struct Codebook<64> {
  static constexpr float kInner = 0.45211896f;
  static constexpr float kOuter = 1.4999748f;
  static constexpr float kBoundary = 0.97604686f;
  static constexpr float kQjlScale = 0.27001733f;
  static constexpr float kQjlWeight = 0.033752166f;
  static constexpr float kRoot = 8.0f;
};

template <>
struct Codebook<128> {
  static constexpr float kInner = 0.45245326f;
  static constexpr float kOuter = 1.505193f;
  static constexpr float kBoundary = 0.9788231f;
  static constexpr float kQjlScale = 0.27174976f;
  static constexpr float kQjlWeight = 0.024019513f;
  static constexpr float kRoot = 11.313708f;
};

}  // namespace tq
