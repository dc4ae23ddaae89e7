// Paged dequantize: reconstruct keys and values of a bounded range of tokens.
//
// Grid: one warp per (output row, KV head, key or value, group); a lane holds group / 32
// coordinates. k = o + alpha B^-1 (H D1)^T u^,  v = beta (H D3)^T C[i]   (reference.py:
// decode_keys, decode_values). Of a token that has an 8-bit copy, its codes and scale take the
// place of u^ or C[i] and of alpha or beta (reference_recent.py: read). Bound by the bytes written,
// 2 * head_dim elements per token and KV head.
#include "core/codebook.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"

namespace tq::cuda {
namespace {

constexpr int kWarps = 8;

// The request that owns `row`: the last one that starts at or before it.
__device__ int find_request(const int32_t* cu_seq_lens, int num_reqs, int64_t row) {
  int low = 0, high = num_reqs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (cu_seq_lens[middle] <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <int kGroup>
__device__ void centroids(const uint8_t* index, float (&x)[kPerLane<kGroup>]) {
  using Book = Codebook<kGroup>;
  const int first = (threadIdx.x & 31) * kPerLane<kGroup>;
  const uint32_t codes = index[first / 4] >> (kIndexBits * (first % 4));
#pragma unroll
  for (int e = 0; e < kPerLane<kGroup>; ++e) {
    const uint32_t code = (codes >> (kIndexBits * e)) & 3;
    const float size = code == 0 || code == 3 ? Book::kOuter : Book::kInner;
    x[e] = code < 2 ? -size : size;
  }
}

// Add rho (H D2)^T s.
template <int kGroup>
__device__ void add_residual(const uint8_t* sign, float (&x)[kPerLane<kGroup>]) {
  constexpr int kCount = kPerLane<kGroup>;
  const int first = (threadIdx.x & 31) * kCount;
  const uint32_t bits = sign[first / 8] >> (first % 8);
  float s[kCount], diagonal[kCount];
#pragma unroll
  for (int e = 0; e < kCount; ++e) s[e] = (bits >> e) & 1 ? 1.0f : -1.0f;
  warp_hadamard<kGroup>(s);
  lane_signs<kGroup, kResidualSigns>(diagonal);
#pragma unroll
  for (int e = 0; e < kCount; ++e) x[e] += Codebook<kGroup>::kQjlWeight * diagonal[e] * s[e];
}

// Read the 8-bit codes of a group of a copied token.
template <int kGroup>
__device__ void copied(const uint8_t* codes, float (&x)[kPerLane<kGroup>]) {
  const int first = (threadIdx.x & 31) * kPerLane<kGroup>;
#pragma unroll
  for (int e = 0; e < kPerLane<kGroup>; ++e) x[e] = static_cast<int8_t>(codes[first + e]);
}

struct KernelParams {
  DequantizeParams p;
  int64_t num_rows;
};

template <int kGroup>
__global__ void __launch_bounds__(kWarps * 32)
    dequantize_kernel(const __grid_constant__ KernelParams params) {
  constexpr int kCount = kPerLane<kGroup>;
  const DequantizeParams& p = params.p;
  const SlotLayout layout = p.cache.layout;
  const int num_groups = layout.num_groups(), block_size = p.cache.block_size;
  const int lane = threadIdx.x & 31;

  // 1. Find the token.
  int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int group = static_cast<int>(item % num_groups);
  item /= num_groups;
  const bool is_value = item % 2;
  item /= 2;
  const int kv_head = static_cast<int>(item % p.cache.num_kv_heads);
  const int64_t row = item / p.cache.num_kv_heads;
  if (row >= params.num_rows || row >= p.cu_seq_lens[p.num_reqs] || row < p.cu_seq_lens[0]) return;
  const int req = find_request(p.cu_seq_lens, p.num_reqs, row);
  const int64_t token = p.seq_starts[req] + row - p.cu_seq_lens[req];
  const int64_t block = p.block_table.data[req * p.block_table.req_stride + token / block_size];
  const int64_t offset = token % block_size;
  const int64_t slot = block * block_size + offset;
  const int32_t mapped = p.copies.data ? p.copies.unit_map[slot / kUnitTokens] : 0;
  const int in_unit = static_cast<int>(slot % kUnitTokens);

  // 2. Decode, still rotated: from the copy, if it is valid, else from codes. All lanes do the
  // same.
  const uint8_t* scale_at;
  float x[kCount];
  if (mapped >> in_unit & 1) {
    const CopyOffsets at = layout.copy_offsets();
    const uint8_t* unit = p.copies.unit(mapped, kv_head);
    copied<kGroup>(
        unit + (is_value ? at.value : at.key) + in_unit * layout.head_dim + group * kGroup, x);
    scale_at = unit + (is_value ? at.value_scale : at.key_scale) +
               (group * kUnitTokens + in_unit) * kScaleBytes;
  } else {
    const BlockOffsets at = layout.offsets(block_size);
    const uint8_t* region = region_of(p.cache, block, kv_head);
    centroids<kGroup>(region + (is_value ? at.value_index : at.key_index) +
                          offset * layout.index_bytes() + group * (kGroup / 4),
                      x);
    if (!is_value) {
      add_residual<kGroup>(
          region + at.key_sign + offset * layout.sign_bytes() + group * (kGroup / 8), x);
    }
    scale_at = region + (is_value ? at.value_scale : at.key_scale) +
               (int64_t{group} * block_size + offset) * kScaleBytes;
  }

  // 3. Rotate back and write.
  warp_hadamard<kGroup>(x);
  float diagonal[kCount];
  if (is_value) {
    lane_signs<kGroup, kValueSigns>(diagonal);
  } else {
    lane_signs<kGroup, kKeySigns>(diagonal);
  }
  const float scale =
      __half2float(*reinterpret_cast<const __half*>(scale_at)) * (1 / Codebook<kGroup>::kRoot);
  const int first = group * kGroup + lane * kCount;
#pragma unroll
  for (int e = 0; e < kCount; ++e) x[e] *= fabsf(scale) * diagonal[e];
  if (!is_value) {
    const KeyFrame& frame = p.key_frame;
    const float* origin =
        (signbit(scale) ? frame.sink(kv_head) : frame.near(kv_head, token)) + first;
    const float* balance = frame.balance(kv_head) + first;
#pragma unroll
    for (int e = 0; e < kCount; ++e) x[e] = x[e] / balance[e] + origin[e];
  }
  write_row(is_value ? p.value : p.key, row, kv_head, first, x);
}

}  // namespace

void dequantize(const DequantizeParams& p, int64_t num_rows, Stream stream) {
  const int64_t num_vectors = num_rows * p.cache.num_kv_heads * 2 * p.cache.layout.num_groups();
  if (num_vectors == 0 || p.num_reqs == 0) return;
  const dim3 grid(static_cast<unsigned>((num_vectors + kWarps - 1) / kWarps));
  const auto kernel = p.cache.layout.group() == 64 ? dequantize_kernel<64> : dequantize_kernel<128>;
  launch(kernel, grid, kWarps * 32, 0, static_cast<cudaStream_t>(stream),
         KernelParams{p, num_rows});
}

}  // namespace tq::cuda
