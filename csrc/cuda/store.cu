// Store: rotate, quantize, sketch and scatter keys and values.
//
// Grid: [num_tokens, CTAs of a token]; one warp per (KV head, key or value, group), a lane holds
// group / 32 consecutive coordinates. The arithmetic is reference.py's (encode_keys, encode_values)
// in the same order, so the bytes are equal. Tokens whose unit has a place among the copies are
// also written there, in 8 bits (reference_recent.py). Latency-bound at decode (a few hundred
// vectors); at prefill about 15 shuffles a coordinate of a lane.
#include "core/codebook.h"
#include "cuda/divisor.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"

namespace tq::cuda {
namespace {

constexpr int kWarps = 4;
constexpr float kHalfMax = 65504.0f;

struct StoreLaunch {
  StoreParams params;
  bool begins_next;
  Divisor num_groups;
  Divisor units_per_block;
};

// Lane's share of one coded group.
struct LaneCode {
  uint32_t index;  // 2 bits a coordinate
  uint32_t sign;   // 1 bit a coordinate
  float scale;     // of the group, same in every lane
};

template <int kGroup, const SignDiagonal& kDiagonal>
__device__ void rotate(const float (&x)[kPerLane<kGroup>], float (&out)[kPerLane<kGroup>]) {
  float sign[kPerLane<kGroup>];
  lane_signs<kGroup, kDiagonal>(sign);
#pragma unroll
  for (int e = 0; e < kPerLane<kGroup>; ++e) out[e] = __fmul_rn(sign[e], x[e]);
  warp_hadamard<kGroup>(out);
}

template <int kGroup>
__device__ float sum_of_squares(const float (&x)[kPerLane<kGroup>]) {
  float squares[kPerLane<kGroup>];
#pragma unroll
  for (int e = 0; e < kPerLane<kGroup>; ++e) squares[e] = __fmul_rn(x[e], x[e]);
  return warp_tree_sum<kGroup>(squares);
}

// Normalize y, a rotated vector of length `norm`; write u, its centroids and its indices.
template <int kGroup>
__device__ void quantize(const float (&y)[kPerLane<kGroup>], float norm,
                         float (&u)[kPerLane<kGroup>], float (&centroid)[kPerLane<kGroup>],
                         uint32_t* index) {
  using Book = Codebook<kGroup>;
  const float inverse = norm > 0.0f ? __fdiv_rn(1.0f, norm) : 0.0f;
  *index = 0;
#pragma unroll
  for (int e = 0; e < kPerLane<kGroup>; ++e) {
    u[e] = __fmul_rn(y[e], inverse);
    const uint32_t code = (u[e] > -Book::kBoundary) + (u[e] > 0.0f) + (u[e] > Book::kBoundary);
    const float size = code == 0 || code == 3 ? Book::kOuter : Book::kInner;
    centroid[e] = code < 2 ? -size : size;
    *index |= code << (kIndexBits * e);
  }
}

// |x| sqrt(d) / <u, u^>, saturated; 0 for a zero vector.
template <int kGroup>
__device__ float group_scale(float norm, float overlap) {
  if (!(norm > 0.0f)) return norm;
  const float scale = __fdiv_rn(__fmul_rn(norm, Codebook<kGroup>::kRoot), overlap);
  return scale > kHalfMax ? kHalfMax : scale;
}

// Lane's coordinates of a key frame.
template <int kCount>
struct LaneFrame {
  float near[kCount], sink[kCount], balance[kCount];

  __device__ void load(const KeyFrame& frame, int kv_head, int64_t position, int first) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      near[e] = frame.near(kv_head, position)[first + e];
      sink[e] = frame.sink(kv_head)[first + e];
      balance[e] = frame.balance(kv_head)[first + e];
    }
  }
};

// Code a key; write y, it as seen from its origin, rotated.
template <int kGroup>
__device__ LaneCode encode_key(float (&x)[kPerLane<kGroup>],
                               const LaneFrame<kPerLane<kGroup>>& frame,
                               float (&y)[kPerLane<kGroup>]) {
  constexpr int kCount = kPerLane<kGroup>;
  float u[kCount], centroid[kCount], projected[kCount], scratch[kCount], far[kCount];
  LaneCode code{};
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    far[e] = __fmul_rn(__fsub_rn(x[e], frame.sink[e]), frame.balance[e]);
    x[e] = __fmul_rn(__fsub_rn(x[e], frame.near[e]), frame.balance[e]);
  }
  float square = sum_of_squares<kGroup>(x);
  const float far_square = sum_of_squares<kGroup>(far);
  const bool at_sink = far_square < square;
  if (at_sink) {
    square = far_square;
#pragma unroll
    for (int e = 0; e < kCount; ++e) x[e] = far[e];
  }
  const float norm = __fsqrt_rn(square);
  rotate<kGroup, kKeySigns>(x, y);
  quantize<kGroup>(y, norm, u, centroid, &code.index);
#pragma unroll
  for (int e = 0; e < kCount; ++e) scratch[e] = __fsub_rn(u[e], centroid[e]);
  rotate<kGroup, kResidualSigns>(scratch, projected);
  rotate<kGroup, kResidualSigns>(u, scratch);
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const bool positive = projected[e] >= 0.0f;
    code.sign |= static_cast<uint32_t>(positive) << e;
    scratch[e] = positive ? scratch[e] : -scratch[e];
    centroid[e] = __fmul_rn(u[e], centroid[e]);
  }
  const float agreement = warp_tree_sum<kGroup>(scratch);
  const float overlap = __fadd_rn(warp_tree_sum<kGroup>(centroid),
                                  __fmul_rn(Codebook<kGroup>::kQjlWeight, agreement));
  code.scale = copysignf(group_scale<kGroup>(norm, overlap), at_sink ? -1.0f : 1.0f);
  return code;
}

// Code a value; write y, it rotated.
template <int kGroup>
__device__ LaneCode encode_value(const float (&x)[kPerLane<kGroup>], float (&y)[kPerLane<kGroup>]) {
  constexpr int kCount = kPerLane<kGroup>;
  float u[kCount], centroid[kCount];
  LaneCode code{};
  const float norm = __fsqrt_rn(sum_of_squares<kGroup>(x));
  rotate<kGroup, kValueSigns>(x, y);
  quantize<kGroup>(y, norm, u, centroid, &code.index);
#pragma unroll
  for (int e = 0; e < kCount; ++e) centroid[e] = __fmul_rn(u[e], centroid[e]);
  code.scale = group_scale<kGroup>(norm, warp_tree_sum<kGroup>(centroid));
  return code;
}

// Write kBits of every lane, lane 0 in the lowest bits of the first byte.
template <int kBits>
__device__ void scatter_bits(uint32_t bits, uint8_t* out) {
  const int lane = threadIdx.x & 31;
  constexpr int kLanesPerByte = 8 / kBits;
#pragma unroll
  for (int step = 1; step < kLanesPerByte; step *= 2) {
    bits |= __shfl_down_sync(kAllLanes, bits, step) << (kBits * step);
  }
  if (lane % kLanesPerByte == 0) out[lane / kLanesPerByte] = static_cast<uint8_t>(bits);
}

// Write y, a rotated vector, in 8 bits as token `offset` of a unit's copies.
template <int kGroup>
__device__ void write_copy(const float (&y)[kPerLane<kGroup>], bool at_sink, uint8_t* vectors,
                           uint8_t* scales, int head_dim, int group, int offset) {
  constexpr int kCount = kPerLane<kGroup>;
  constexpr float kLargest = 127.0f;
  const int lane = threadIdx.x & 31;
  unsigned bits = 0;  // of the largest magnitude, or of a NaN, whose bits exceed those of numbers
#pragma unroll
  for (int e = 0; e < kCount; ++e) bits = max(bits, __float_as_uint(y[e]) & 0x7fffffffu);
  const float largest = __uint_as_float(__reduce_max_sync(kAllLanes, bits));
  const float inverse = largest == 0.0f ? 0.0f : __fdiv_rn(kLargest, largest);
  int8_t* out = reinterpret_cast<int8_t*>(vectors) + offset * head_dim + group * kGroup;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const int code = __float2int_rn(__fmul_rn(y[e], inverse));  // 0 for NaN
    out[lane * kCount + e] = static_cast<int8_t>(min(max(code, -127), 127));
  }
  if (lane == 0) {
    const float scale = __fdiv_rn(largest, kLargest * Codebook<kGroup>::kRoot);
    reinterpret_cast<__half*>(scales)[group * kUnitTokens + offset] =
        __float2half_rn(copysignf(scale, at_sink ? -1.0f : 1.0f));
  }
}

template <int kGroup>
__global__ void __launch_bounds__(kWarps * 32)
    store_kernel(const __grid_constant__ StoreLaunch launch) {
  constexpr int kCount = kPerLane<kGroup>;
  const StoreParams& p = launch.params;
  const SlotLayout layout = p.cache.layout;
  const int block_size = p.cache.block_size;
  const int lane = threadIdx.x & 31;
  if (launch.begins_next) begin_next();

  // 1. Find the vector and its slot, and ask for all that is read.
  const int64_t token = blockIdx.x;
  const int vector = blockIdx.y * kWarps + threadIdx.x / 32;
  const int head_and_kind = launch.num_groups.divide(vector);
  const int group = vector - head_and_kind * launch.num_groups.value();
  const int kv_head = head_and_kind / 2;
  const bool is_value = head_and_kind % 2;
  if (kv_head >= p.cache.num_kv_heads) return;
  const int64_t slot = p.slot_mapping[token], position = p.position(token);
  const int first = group * kGroup + lane * kCount;
  RowElements<kCount> elements;
  elements.load(is_value ? p.value : p.key, token, kv_head, first);
  LaneFrame<kCount> frame;
  if (!is_value) frame.load(p.key_frame, kv_head, position, first);
  if (slot < 0) return;
  const Copies& copies = p.copies;
  const int unit = static_cast<int>(slot / kUnitTokens);  // fits, as in unit_map
  const int32_t mapped = copies.data ? copies.unit_map[unit] : 0;

  // 2. Code it.
  float x[kCount], y[kCount];
  elements.convert(is_value ? p.value.dtype : p.key.dtype, x);
  const LaneCode code = is_value ? encode_value<kGroup>(x, y) : encode_key<kGroup>(x, frame, y);

  // 3. Write it.
  const BlockOffsets at = layout.offsets(block_size);
  const int64_t block = launch.units_per_block.divide(unit);
  const int64_t offset = slot - block * block_size;
  uint8_t* region = region_of(p.cache, block, kv_head);
  uint8_t* index = region + (is_value ? at.value_index : at.key_index) +
                   offset * layout.index_bytes() + group * (kGroup / 4);
  scatter_bits<kIndexBits * kCount>(code.index, index);
  if (!is_value) {
    uint8_t* sign = region + at.key_sign + offset * layout.sign_bytes() + group * (kGroup / 8);
    scatter_bits<kSignBits * kCount>(code.sign, sign);
  }
  if (lane == 0) {
    uint8_t* scales = region + (is_value ? at.value_scale : at.key_scale);
    reinterpret_cast<__half*>(scales)[int64_t{group} * block_size + offset] =
        __float2half_rn(code.scale);
  }

  // 4. Copy it, if its unit has a place.
  if (mapped == 0) return;
  const CopyOffsets in = layout.copy_offsets();
  uint8_t* to = copies.unit(mapped, kv_head);
  const int in_unit = static_cast<int>(slot % kUnitTokens);
  if (is_value) {
    write_copy<kGroup>(y, false, to + in.value, to + in.value_scale, layout.head_dim, group,
                       in_unit);
  } else {
    write_copy<kGroup>(y, signbit(code.scale), to + in.key, to + in.key_scale, layout.head_dim,
                       group, in_unit);
  }
}

int ctas_per_token(const StoreParams& p) {
  const int vectors = p.cache.num_kv_heads * 2 * p.cache.layout.num_groups();
  return (vectors + kWarps - 1) / kWarps;
}

}  // namespace

int64_t store_ctas(const StoreParams& p) { return p.num_tokens * ctas_per_token(p); }

void store(const StoreParams& p, Stream stream, bool begins_next) {
  if (p.num_tokens == 0) return;
  const StoreLaunch params{p, begins_next, Divisor(p.cache.layout.num_groups()),
                           Divisor(p.cache.block_size / kUnitTokens)};
  const dim3 grid(static_cast<unsigned>(p.num_tokens), ctas_per_token(p));
  const auto kernel = p.cache.layout.group() == 64 ? store_kernel<64> : store_kernel<128>;
  launch(kernel, grid, kWarps * 32, 0, static_cast<cudaStream_t>(stream), params);
}

}  // namespace tq::cuda
