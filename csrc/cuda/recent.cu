// Which units of 16 tokens have 8-bit copies: reference_recent.py (assign), in the same order.
//
// One CTA, a step's requests in its warps, then its threads: a few microseconds, once a step for
// all layers.
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace tq::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;

// Units of one request, counted from its first token.
struct Request {
  const AssignParams& p;
  int req, num_units, window, begin, seq_len;  // tokens from `begin` on are written in this step

  __device__ Request(const AssignParams& p_, int req_) : p(p_), req(req_) {
    seq_len = p.seq_lens[req];
    num_units = (seq_len + kUnitTokens - 1) / kUnitTokens;
    window = first_window_unit(seq_len, p.window_units);
    begin = max(seq_len - (p.query_start_loc[req + 1] - p.query_start_loc[req]), 0);
  }
  __device__ int64_t unit(int i) const {
    const int block = p.block_table.data[req * p.block_table.req_stride + i / p.units_per_block];
    return int64_t{block} * p.units_per_block + i % p.units_per_block;
  }
  __device__ bool writes(int i) const { return i >= begin / kUnitTokens && i < num_units; }
  // Valid bits of unit i that this step leaves as they are, and those that it sets.
  __device__ int32_t kept(int i) const { return bits(begin - i * kUnitTokens); }
  __device__ int32_t set(int i) const { return bits(seq_len - i * kUnitTokens) & ~kept(i); }

 private:
  __device__ static int32_t bits(int count) { return (1 << min(max(count, 0), kUnitTokens)) - 1; }
};

constexpr int32_t kPlaceBits = ~0xffff;

// Number of threads before this one that have `flag`; adds the number of all to `*total`, which all
// threads share.
__device__ int rank_in_block(bool flag, int* total) {
  __shared__ int before[kWarps + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const unsigned flags = __ballot_sync(kAllLanes, flag);
  __syncthreads();  // all are done with the call before
  if (lane == 0) before[warp + 1] = __popc(flags);
  if (threadIdx.x == 0) before[0] = *total;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w <= kWarps; ++w) before[w] += before[w - 1];
    *total = before[kWarps];
  }
  __syncthreads();
  return before[warp] + __popc(flags & ((1u << lane) - 1));
}

__global__ void __launch_bounds__(kThreads) assign_kernel(const AssignParams p) {
  __shared__ int num_wanted, num_found, last_taken, num_in_windows, num_placed;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  int32_t* wanted = p.clock + 3;
  const int first_place = p.clock[0];
  if (threadIdx.x == 0) {
    num_wanted = num_found = num_in_windows = num_placed = 0;
    last_taken = -1;
  }

  // 1. Which places windows need; copies outside of windows whose tokens this step overwrites.
  for (int req = warp; req < p.num_reqs; req += kWarps) {
    const Request r(p, req);
    for (int i = r.window + lane; i < r.num_units; i += 32) {
      const int32_t mapped = p.unit_map[r.unit(i)];
      if (mapped) p.places[(mapped >> 16) - 1][1] = p.step;
    }
    for (int i = r.begin / kUnitTokens + lane; i < r.window; i += 32) {
      const int64_t unit = r.unit(i);
      const int32_t mapped = p.unit_map[unit];
      if (mapped) p.unit_map[unit] = mapped & (kPlaceBits | r.kept(i));
    }
  }
  __syncthreads();

  // 2. List the units that want a place; those past the number of places get none.
  const int num_items = p.num_reqs * p.window_units;
  for (int first = 0; first < num_items; first += kThreads) {
    const int item = first + static_cast<int>(threadIdx.x);
    int64_t unit = 0;
    bool wants = false;
    if (item < num_items) {
      const Request r(p, item / p.window_units);
      const int i = r.window + item % p.window_units;
      if (r.writes(i)) unit = r.unit(i), wants = p.unit_map[unit] == 0;
    }
    const int rank = rank_in_block(wants, &num_wanted);
    if (wants && rank < p.num_places) wanted[rank] = static_cast<int32_t>(unit);
  }
  __syncthreads();

  // 3. Hand out the places that no window needs.
  const int most = min(num_wanted, p.num_places);
  for (int first = 0; first < p.num_places && num_found < most; first += kThreads) {
    const int order = first + static_cast<int>(threadIdx.x);
    const int place = (first_place + order) % p.num_places;
    const bool is_free = order < p.num_places && p.places[place][1] != p.step;
    const int rank = rank_in_block(is_free, &num_found);
    if (is_free && rank < most) {
      const int32_t former = p.places[place][0], unit = wanted[rank];
      if (former >= 0 && (p.unit_map[former] >> 16) - 1 == place) p.unit_map[former] = 0;
      p.unit_map[unit] = (place + 1) << 16;
      p.places[place][0] = unit;
      p.places[place][1] = p.step;
      atomicMax(&last_taken, order);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && last_taken >= 0) {
    p.clock[0] = (first_place + last_taken + 1) % p.num_places;
  }

  // 4. Note the copies that this step writes; count what windows have.
  for (int item = threadIdx.x; item < num_items; item += kThreads) {
    const Request r(p, item / p.window_units);
    const int i = r.window + item % p.window_units;
    if (i >= r.num_units) continue;
    const int64_t unit = r.unit(i);
    const int32_t mapped = p.unit_map[unit];
    atomicAdd(&num_in_windows, 1);
    if (!mapped) continue;
    atomicAdd(&num_placed, 1);
    if (r.writes(i)) p.unit_map[unit] = (mapped & (kPlaceBits | r.kept(i))) | r.set(i);
  }
  __syncthreads();
  if (threadIdx.x == 0) p.clock[1] = num_in_windows, p.clock[2] = num_placed;
}

}  // namespace

void assign_recent(const AssignParams& p, Stream stream) {
  launch(assign_kernel, dim3(1), kThreads, 0, static_cast<cudaStream_t>(stream), p);
}

}  // namespace tq::cuda
