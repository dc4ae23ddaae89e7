// Hadamard transform of a single vector, with its coordinates in lanes.
#pragma once

#include "core/rotation.h"
#include "cpu/simd.h"

namespace tq::cpu {

// kSize floats side by side.
template <int kSize>
struct Column {
  float x[kSize];

  Column operator+(const Column& other) const {
    Column r;
    for (int i = 0; i < kSize; ++i) r.x[i] = x[i] + other.x[i];
    return r;
  }
  Column operator-(const Column& other) const {
    Column r;
    for (int i = 0; i < kSize; ++i) r.x[i] = x[i] - other.x[i];
    return r;
  }
};

// Multiply x[kGroup] in place by the unnormalized Hadamard matrix. H_n = H_(n / 16) (x) H_16:
// transform, transpose, transform, transpose back, so that no step works inside a vector.
template <int kGroup>
inline void hadamard_row(float* x) {
  constexpr int kRows = kGroup / kLanes;
  Lanes rows[kRows];
  for (int i = 0; i < kRows; ++i) rows[i] = load(x + i * kLanes);
  hadamard<kRows>(rows);
  for (int i = 0; i < kRows; ++i) store(x + i * kLanes, rows[i]);
  Column<kRows> columns[kLanes];
  for (int j = 0; j < kLanes; ++j) {
    for (int i = 0; i < kRows; ++i) columns[j].x[i] = x[i * kLanes + j];
  }
  hadamard<kLanes>(columns);
  for (int j = 0; j < kLanes; ++j) {
    for (int i = 0; i < kRows; ++i) x[i * kLanes + j] = columns[j].x[i];
  }
}

// A sign diagonal as floats.
struct SignTable {
  alignas(64) float sign[kMaxGroup];
  constexpr explicit SignTable(const SignDiagonal& diagonal) : sign() {
    for (int j = 0; j < kMaxGroup; ++j) sign[j] = diagonal[j];
  }
};
inline constexpr SignTable kKeySignTable{kKeySigns};
inline constexpr SignTable kResidualSignTable{kResidualSigns};
inline constexpr SignTable kValueSignTable{kValueSigns};

}  // namespace tq::cpu
