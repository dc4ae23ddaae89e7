// Checks of operator arguments. Every message names the argument, what was given and what is
// expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>

#include "core/params.h"

namespace tq::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kAny = -1;  // matches every size

inline std::string join(std::initializer_list<int64_t> sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    text += (text.size() > 1 ? ", " : "") + (size == kAny ? "any" : std::to_string(size));
  }
  return text + "]";
}

inline std::string shape_of(const Tensor& x) {
  std::string text = "[";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + "]";
}

inline void check_shape(const char* name, const Tensor& x,
                        std::initializer_list<int64_t> expected) {
  bool matches = x.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (const int64_t size : expected) {
    matches = matches && (size == kAny || x.size(i) == size);
    ++i;
  }
  STD_TORCH_CHECK(matches, name, " has shape ", shape_of(x), ", expected ", join(expected));
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    default:
      return "another dtype";
  }
}

inline void check_dtype(const char* name, const Tensor& x, ScalarType expected) {
  STD_TORCH_CHECK(x.scalar_type() == expected, name, " is ", dtype_name(x.scalar_type()),
                  ", expected ", dtype_name(expected));
}

inline void check_contiguous(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
}

inline Dtype float_dtype(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBfloat16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, " is ", dtype_name(x.scalar_type()),
                  ", expected float32, float16 or bfloat16");
}

// [num_tokens, num_heads, head_dim] with a contiguous last axis.
inline void check_rows(const char* name, const Tensor& x, int64_t num_heads, int64_t head_dim) {
  check_shape(name, x, {kAny, num_heads, head_dim});
  STD_TORCH_CHECK(x.stride(2) == 1, name, " has stride ", x.stride(2),
                  " along head_dim, expected 1");
}

inline Rows rows(const char* name, const Tensor& x, int64_t num_heads, int64_t head_dim) {
  check_rows(name, x, num_heads, head_dim);
  return {x.data_ptr(), float_dtype(name, x), x.stride(0), x.stride(1)};
}

inline MutableRows mutable_rows(const char* name, const Tensor& x, int64_t num_heads,
                                int64_t head_dim) {
  check_rows(name, x, num_heads, head_dim);
  return {x.data_ptr(), float_dtype(name, x), x.stride(0), x.stride(1)};
}

inline Cache cache(const Tensor& x, int64_t head_dim) {
  STD_TORCH_CHECK(SlotLayout::supports(static_cast<int>(head_dim)), "head_dim is ", head_dim,
                  ", supported: 64, 128, 256, 384, 512");
  const SlotLayout layout{static_cast<int>(head_dim)};
  check_dtype("kv_cache", x, ScalarType::Byte);
  check_shape("kv_cache", x, {kAny, kAny, kAny, layout.slot_bytes()});
  const int64_t block_size = x.size(2);
  STD_TORCH_CHECK(block_size > 0 && block_size % kBlockSizeMultiple == 0,
                  "kv_cache has block_size ", block_size, ", expected a multiple of ",
                  kBlockSizeMultiple);
  STD_TORCH_CHECK(x.stride(3) == 1 && x.stride(2) == layout.slot_bytes(),
                  "kv_cache must hold each (block, head) contiguously");
  return {static_cast<uint8_t*>(x.data_ptr()),
          x.stride(0),
          x.stride(1),
          x.size(0),
          static_cast<int>(block_size),
          static_cast<int>(x.size(1)),
          layout};
}

inline KeyFrame key_frame(const Tensor& x, int64_t num_kv_heads, int64_t head_dim) {
  check_dtype("key_frame", x, ScalarType::Float);
  check_shape("key_frame", x, {num_kv_heads, kAny, head_dim});
  STD_TORCH_CHECK(x.size(1) >= 3, "key_frame has ", x.size(1), " rows, expected 3 or more");
  check_contiguous("key_frame", x);
  return {static_cast<const float*>(x.data_ptr()), static_cast<int>(head_dim),
          static_cast<int>(x.size(1) - 3)};
}

// Contiguous int32 [size].
inline const int32_t* int_vector(const char* name, const Tensor& x, int64_t size) {
  check_dtype(name, x, ScalarType::Int);
  check_shape(name, x, {size});
  check_contiguous(name, x);
  return static_cast<const int32_t*>(x.data_ptr());
}

// Contiguous int64 [size].
inline const int64_t* int64_vector(const char* name, const Tensor& x, int64_t size) {
  check_dtype(name, x, ScalarType::Long);
  check_shape(name, x, {size});
  check_contiguous(name, x);
  return static_cast<const int64_t*>(x.data_ptr());
}

inline BlockTable block_table(const Tensor& x, int64_t num_reqs) {
  check_dtype("block_table", x, ScalarType::Int);
  check_shape("block_table", x, {num_reqs, kAny});
  STD_TORCH_CHECK(x.size(1) == 0 || x.stride(1) == 1, "block_table has stride ", x.stride(1),
                  " along blocks, expected 1");
  return {static_cast<const int32_t*>(x.data_ptr()), x.stride(0)};
}

}  // namespace tq::ops
