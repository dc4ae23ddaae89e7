// Reading and writing one vector of a tensor of any floating dtype.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/params.h"

namespace tq::cpu {

// Copy `count` coordinates of (token, head) from coordinate `first` on into out[count].
inline void read_row(const Rows& rows, int64_t token, int64_t head, int first, int count,
                     float* out) {
  const int64_t at = token * rows.token_stride + head * rows.head_stride + first;
  if (rows.dtype == Dtype::kFloat32) {
    const float* x = static_cast<const float*>(rows.data) + at;
    for (int j = 0; j < count; ++j) out[j] = x[j];
    return;
  }
  const uint16_t* x = static_cast<const uint16_t*>(rows.data) + at;
  if (rows.dtype == Dtype::kBfloat16) {
    for (int j = 0; j < count; ++j) out[j] = float_from_bfloat16(x[j]);
  } else {
    for (int j = 0; j < count; ++j) out[j] = float_from_half(x[j]);
  }
}

// Round in[count] to the tensor's dtype and write it from coordinate `first` of (token, head) on.
inline void write_row(const MutableRows& rows, int64_t token, int64_t head, int first, int count,
                      const float* in) {
  const int64_t at = token * rows.token_stride + head * rows.head_stride + first;
  if (rows.dtype == Dtype::kFloat32) {
    float* x = static_cast<float*>(rows.data) + at;
    for (int j = 0; j < count; ++j) x[j] = in[j];
    return;
  }
  uint16_t* x = static_cast<uint16_t*>(rows.data) + at;
  if (rows.dtype == Dtype::kBfloat16) {
    for (int j = 0; j < count; ++j) x[j] = bfloat16_from_float(in[j]);
  } else {
    for (int j = 0; j < count; ++j) x[j] = half_from_float(in[j]);
  }
}

}  // namespace tq::cpu
