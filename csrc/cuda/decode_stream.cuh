// The tokens that one warp reads: batches of units, copied ahead into a ring in shared memory.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/decode_traits.cuh"
#include "cuda/ptx.cuh"
#include "cuda/warp.cuh"

namespace tq::cuda {

// Fill in what the warps of a CTA share.
template <typename Traits>
__device__ inline void prepare_stream(const AttentionParams& p, typename Traits::Stream* stream) {
  const BlockOffsets at = SlotLayout{Traits::kHeadDim}.offsets(p.cache.block_size);
  const int scale_row = p.cache.block_size * kScaleBytes;
#pragma unroll 1
  for (int i = threadIdx.x; i < Traits::kChunksPerLane * 32; i += Traits::kThreads) {
    const int byte = i * 16;
    int offset = static_cast<int>(at.key_index) + byte, step = Traits::kIndexBytes;
    if (byte >= Traits::kKeyScaleAt) {
      const bool is_value = byte >= Traits::kValueScaleAt;
      const int row = byte - (is_value ? Traits::kValueScaleAt : Traits::kKeyScaleAt);
      offset = static_cast<int>(is_value ? at.value_scale : at.key_scale) +
               row / Traits::kScaleRowBytes * scale_row + row % Traits::kScaleRowBytes;
      step = Traits::kScaleRowBytes;
    } else if (byte >= Traits::kValueIndexAt) {
      offset = static_cast<int>(at.value_index) + byte - Traits::kValueIndexAt;
    } else if (byte >= Traits::kKeySignAt) {
      offset = static_cast<int>(at.key_sign) + byte - Traits::kKeySignAt;
      step = Traits::kSignBytes;
    }
    stream->pieces[i / 32][i % 32] = {offset, step};
  }
  if (threadIdx.x < 2) {
    stream->tables[threadIdx.x] = {IntegerBook<Traits::kGroup>::kTable,
                                   HalfBook<Traits::kGroup>::kTable};
  }
}

// Batches first, first + kWarps, ... below end. Warps do not wait for each other, nor for store
// before they come to tokens from `stored` on; see Sight.
template <typename Traits>
class DecodeStream {
 public:
  static constexpr int kLookUp =
      32 / Traits::kBatchUnits;  // batches whose blocks are found at once

  __device__ DecodeStream(const DecodeParams& p, int req, int kv_head, int first, int end,
                          int stored, const typename Traits::Stream& shared, uint8_t* ring)
      : p_(p.attention),
        units_per_block_(p.units_per_block),
        req_(req),
        kv_head_(kv_head),
        first_(first),
        end_(end),
        stored_(stored),
        shared_(shared),
        ring_(shared_address(ring) + (threadIdx.x & 31) * 16) {}

  __device__ int num_batches() const {
    return end_ > first_ ? (end_ - first_ + Traits::kWarps - 1) / Traits::kWarps : 0;
  }

  // First token of the stream's batch n.
  __device__ int token(int n) const { return (first_ + n * Traits::kWarps) * Traits::kBatchTokens; }

  // Find the first batches, in two steps, between which the warp can do other things.
  __device__ void look_up() {
    if (num_batches() > 0) look_up(0);
  }
  __device__ void locate() {
    region_ = block_ == kNone ? nullptr : region_of(p_.cache, block_, kv_head_);
  }

  // Start copying batch n into the ring's slot. All lanes are done with what it held. The first
  // batches have been found and located.
  __device__ void fetch(int n, int slot) {
    if (n < num_batches()) {
      if (n > 0 && n % kLookUp == 0) look_up(n), locate();
      if (token(n) + Traits::kBatchTokens > stored_) await_previous();
      copy(n % kLookUp, slot);
    }
    cp_async_commit();  // one group for every call, so that the waiter can count them
  }

  // Wait for the oldest batch in flight. The ring's slot before it is free from then on.
  __device__ void wait() const {
    cp_async_wait<Traits::kStages - 2>();
    __syncwarp();
  }

 private:
  static constexpr int kNone = -1;

  // Find the 32 units from batch n on, one in every lane; none where the sequence has ended.
  __device__ void look_up(int n) {
    const int lane = threadIdx.x & 31;
    const int batch = first_ + (n + lane / Traits::kBatchUnits) * Traits::kWarps;
    const int unit = batch * Traits::kBatchUnits + lane % Traits::kBatchUnits;
    block_ = kNone;
    if (batch < end_ && int64_t{unit} * Traits::kUnitTokens < p_.seq_lens[req_]) {
      const int block = units_per_block_.divide(unit);
      unit_in_block_ = unit - block * units_per_block_.value();
      block_ = p_.block_table.data[req_ * p_.block_table.req_stride + block];
    }
  }

  __device__ void copy(int batch, int slot) const {
    const int lane = threadIdx.x & 31;
    const uint32_t to = ring_ + slot * Traits::kBatchBytes;
#pragma unroll
    for (int k = 0; k < Traits::kBatchUnits; ++k) {
      const int source = batch * Traits::kBatchUnits + k;
      const uint8_t* region = reinterpret_cast<const uint8_t*>(
          __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(region_), source));
      const int unit_in_block = __shfl_sync(kAllLanes, unit_in_block_, source);
#pragma unroll
      for (int i = 0; i < Traits::kChunksPerLane; ++i) {
        if (region && lane + 32 * i < Traits::kUnitChunks) {
          const int2 piece = shared_.pieces[i][lane];
          cp_async_16(to + k * Traits::kUnitBytes + i * 512,
                      region + (piece.x + unit_in_block * piece.y));
        }
      }
    }
  }

  const AttentionParams& p_;
  const Divisor& units_per_block_;
  const int req_, kv_head_, first_, end_, stored_;
  const typename Traits::Stream& shared_;
  const uint32_t ring_;              // this lane's first piece of slot 0
  int block_ = kNone;                // of this lane's unit
  const uint8_t* region_ = nullptr;  // the same
  int unit_in_block_ = 0;
};

}  // namespace tq::cuda
