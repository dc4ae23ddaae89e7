// Split-KV paged decode attention over turboquant3 slots.
//
// Grid: [num_splits, num_kv_heads, num_reqs]. Every warp of a CTA is a flash-decoding stream of its
// own over batches of 32 tokens; the warps meet once, at the end. The CTA that is last of its
// request and KV head merges the splits.
// Score of a token: alpha * (<q1, C[i]> + rho * <q2, s>) + <q, o>    (reference.py: score_codes)
//   S[16 tokens x 8] = K[16 x d] Q^T[d x 8] in int8; a column pair is a row's high and low part.
// Output: (H D3)^T sum_t p_t beta_t C[i_t].
//   O^T[d x 8] += V^T[d x 16 tokens] P^T[16 x 8] in float16; a column is a query row.
// Where the request's window has 8-bit copies (reference_recent.py), the CTA with its last tokens
// reads these, after its batches; their codes get no weight.
// May begin while store writes the newest tokens (decode.cu): a warp reads what is older at once,
// and calls await_previous() before it comes to what is new. Reads each slot once for up to kRows
// query rows. Meant to be bound by these bytes; decoding the codes keeps the integer pipe about as
// busy: two instructions a coordinate, most of them integer. The order of additions is fixed, so
// equal inputs give equal bits.
#pragma once

#include <algorithm>
#include <climits>

#include "cuda/codes.cuh"
#include "cuda/decode_merge.cuh"
#include "cuda/decode_query.cuh"
#include "cuda/decode_scores.cuh"
#include "cuda/decode_stream.cuh"
#include "cuda/decode_traits.cuh"
#include "cuda/decode_values.cuh"
#include "cuda/launch.cuh"

namespace tq::cuda {

// Tokens of a request that were stored in earlier steps, surely. One that joins in this step may
// share a block that another request completes in it; it then begins with a block, and so a unit.
__device__ inline int stored_before(int seq_len, int query_len) {
  const int begin = seq_len - query_len;
  return begin % kUnitTokens == 0 ? 0 : begin;
}

// What this lane's rows, 4 i + t, see of a request's tokens.
template <typename Traits>
struct Sight {
  int seq_len;                   // tokens that the request has
  int stored;                    // of these, in the cache and the copies before this step's store
  int all_begin, all_end;        // those that all rows see by their codes
  int below[Traits::kKeyTiles];  // as AttentionParams::sees_below
  int sliding_window;
  int window;             // first token that may have a copy
  const int32_t* mapped;  // units from there on, as in Copies::unit_map

  __device__ Sight(const AttentionParams& a, const RowRange& rows, int req, const int32_t* mapped_)
      : seq_len(a.seq_lens[req]),
        stored(stored_before(seq_len, rows.query_len)),
        sliding_window(a.sliding_window),
        mapped(mapped_) {
    window = a.copies.data ? first_window_unit(seq_len, a.copies.window_units) * Traits::kUnitTokens
                           : INT_MAX;
    all_begin = 0, all_end = min(seq_len, window);
#pragma unroll
    for (int i = 0; i < Traits::kKeyTiles; ++i) {
      const int own = rows.own_token(4 * i + (threadIdx.x & 3));
      below[i] = a.sees_below(seq_len, rows.query_len, min(own, rows.query_len - 1));
      all_begin = max(all_begin, below[i] - sliding_window);
      all_end = min(all_end, below[i]);
    }
    all_begin = __reduce_max_sync(kAllLanes, all_begin);
    all_end = __reduce_min_sync(kAllLanes, all_end);
  }

  // Whether a row, 4 i + t, sees a token of the request.
  __device__ bool sees(int i, int token) const {
    return static_cast<unsigned>(below[i] - 1 - token) < static_cast<unsigned>(sliding_window);
  }

  // Whether all rows see all tokens of a batch by their codes.
  __device__ bool all_see(int first_token) const {
    return first_token >= all_begin && first_token + Traits::kBatchTokens <= all_end;
  }

  // Entry of Copies::unit_map for the unit with this first token; 0 outside of the window.
  __device__ int32_t unit(int first_token) const {
    return first_token >= window ? mapped[(first_token - window) / Traits::kUnitTokens] : 0;
  }

  // Whether all tokens of a unit have a copy, or it has none.
  __device__ bool is_copied(int first_token) const {
    const int count = min(max(seq_len - first_token, 0), Traits::kUnitTokens);
    return (~unit(first_token) & ((1 << count) - 1)) == 0;
  }

  // Before unit i of the window is read from copies.
  __device__ void await_copies(int i) const {
    if (window + (i + 1) * Traits::kUnitTokens > stored) await_previous();
  }

  // Leave of a unit's tokens those that rows see and that have a copy, or have none.
  __device__ void hide(int first_token, bool copied, UnitScores<Traits>* unit) const {
    const int32_t valid = this->unit(first_token);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int in_unit = (threadIdx.x & 31) / 4 + 8 * h, token = first_token + in_unit;
      const bool is_there = token < seq_len && (valid >> in_unit & 1) == copied;
      bool any_sees = false;
#pragma unroll
      for (int i = 0; i < Traits::kKeyTiles; ++i) {
        const bool is_seen = is_there && sees(i, token);
        if (!is_seen) unit->score[i][h] = -INFINITY;
        any_sees |= is_seen;
      }
#pragma unroll
      for (int g = 0; g < Traits::kNumGroups; ++g) {
        // NOTE: the scale may be NaN here, which a weight of 0 would not silence.
        if (!any_sees) unit->beta[g][h] = 0.0f;
      }
    }
  }
};

// The units of a request's window, one in every lane of a warp, looked up in steps, between which
// the warp can do other things.
template <typename Traits>
class WindowUnits {
 public:
  __device__ WindowUnits(const DecodeParams& p, int req, bool wanted)
      : a_(p.attention), units_per_block_(p.units_per_block) {
    const AttentionParams& a = p.attention;
    const int lane = threadIdx.x & 31, seq_len = a.seq_lens[req];
    const int unit = first_window_unit(seq_len, a.copies.window_units) + lane;
    exists_ = wanted && lane < a.copies.window_units && unit * Traits::kUnitTokens < seq_len;
    if (exists_) {
      const int block = units_per_block_.divide(unit);
      unit_in_block_ = unit - block * units_per_block_.value();
      block_ = a.block_table.data[req * a.block_table.req_stride + block];
    }
  }

  // Entries of Copies::unit_map, 0 for what is not there.
  __device__ void look_up() {
    if (!exists_) return;
    mapped_ = a_.copies.unit_map[block_ * units_per_block_.value() + unit_in_block_];
  }

  // Tell the CTA, and bring closer what it will read of the copies and not fetch.
  __device__ void share(int kv_head, bool reads_copies, int32_t* window) const {
    constexpr int kLineBytes = 128;
    const int lane = threadIdx.x & 31;
    if (lane < Traits::kWindowUnits) window[lane] = mapped_;
    if (!reads_copies) return;
    for (int i = Traits::kCopyBuffers; i < a_.copies.window_units; ++i) {
      const int32_t other = __shfl_sync(kAllLanes, mapped_, i);
      if ((other & 0xffff) == 0) continue;
      const uint8_t* copies = a_.copies.unit(other, kv_head);
      for (int at = lane * kLineBytes; at < a_.copies.unit_bytes; at += 32 * kLineBytes) {
        prefetch_l2(copies + at);
      }
    }
  }

 private:
  const AttentionParams& a_;
  const Divisor& units_per_block_;
  bool exists_;
  int unit_in_block_ = 0;
  int64_t block_ = 0;
  int32_t mapped_ = 0;
};

// The first unit of a window that is this warp's turn. The last warps begin: they may have one
// batch less than the others, and whoever has the last batches skips what has copies.
template <typename Traits>
__device__ inline int first_copied_unit() {
  return Traits::kWarps - 1 - threadIdx.x / 32;
}

// Start copying the unit of copies that is this warp's turn, where there is a buffer for it.
template <typename Traits>
__device__ inline void fetch_copies(const AttentionParams& a, int kv_head,
                                    const Sight<Traits>& sight, uint8_t* buffers) {
  const int i = first_copied_unit<Traits>();
  if (i >= min(a.copies.window_units, Traits::kCopyBuffers)) return;
  const int32_t mapped = sight.mapped[i];
  if ((mapped & 0xffff) == 0) return;
  sight.await_copies(i);
  const uint8_t* copies = a.copies.unit(mapped, kv_head);
  const uint32_t buffer = shared_address(buffers + i * Traits::kCopyBytes);
  for (int at = (threadIdx.x & 31) * 16; at < Traits::kCopyBytes; at += 32 * 16) {
    cp_async_16(buffer + at, copies + at);
  }
}

// Attend to the copies of a window that are this warp's turn.
template <typename Traits>
__device__ inline void attend_copies(const AttentionParams& a, int kv_head,
                                     const QueryOperands<Traits>& query, const Sight<Traits>& sight,
                                     const typename Traits::Shared& shared,
                                     ScoreFactors<Traits>& factors, DecodeState<Traits>& state) {
  for (int i = first_copied_unit<Traits>(); i < a.copies.window_units; i += Traits::kWarps) {
    const int32_t mapped = sight.mapped[i];
    if ((mapped & 0xffff) == 0) continue;
    sight.await_copies(i);
    const uint8_t* copies = i < Traits::kCopyBuffers ? shared.copies + i * Traits::kCopyBytes
                                                     : a.copies.unit(mapped, kv_head);
    const int first = sight.window + i * Traits::kUnitTokens;
    factors.enter(shared.span_of(first));
    UnitScores<Traits> units[1];
    score_copies<Traits>(copies, query, factors, units);
    sight.hide(first, true, units);
    add_units<Traits>(
        units, [&](int, int g) { return CopiedValues<Traits>(copies, g); }, factors.near, state);
  }
}

// Attend to neighbouring units by their codes. Where all rows see all their tokens so, kMasked is
// not needed.
template <typename Traits, int kUnits, bool kMasked>
__device__ inline void attend_codes(const uint2& tables, const uint8_t* codes, int first_token,
                                    const QueryOperands<Traits>& query,
                                    const ScoreFactors<Traits>& factors, const Sight<Traits>& sight,
                                    DecodeState<Traits>& state) {
  UnitScores<Traits> units[kUnits];
#pragma unroll
  for (int k = 0; k < kUnits; ++k) {
    score_unit<Traits>(tables.x, codes + k * Traits::kUnitBytes, query, factors, &units[k]);
    if constexpr (kMasked) sight.hide(first_token + k * Traits::kUnitTokens, false, &units[k]);
  }
  add_units<Traits>(
      units,
      [&](int k, int g) {
        return CodedValues<Traits>(tables.y, codes + k * Traits::kUnitBytes, g);
      },
      factors.near, state);
}

// Rows of a CTA's KV head, from first_row on.
template <typename Work>
__device__ inline RowRange rows_from(const DecodeParams& p, const Work& work, int first_row) {
  return {p.group_size, work.first_token, work.query_len, static_cast<int>(blockIdx.y), first_row};
}

// Attend one tile of rows to a CTA's batches, and write its partial result.
template <typename Traits>
__device__ inline void attend_tile(const DecodeParams& p, const typename Traits::Work& work,
                                   int first_row, typename Traits::Shared* shared) {
  const AttentionParams& a = p.attention;
  const int warp = threadIdx.x / 32, req = blockIdx.z, begin = work.begin, end = work.end;
  const RowRange rows = rows_from(p, work, first_row);
  const Sight<Traits> sight(a, rows, req, shared->window);
  // NOTE: without a batch, there is nothing to see, and nobody looks the window up.
  const bool reads_copies =
      a.copies.data && begin < end && end * Traits::kBatchTokens >= sight.seq_len;

  // 1. Ask for the first batch, and prepare the queries while its bytes are on their way; then ask
  // for more. What the warps need first is asked for first: it would wait behind all codes.
  LoadedQuery<Traits> loaded;
  if (warp < Traits::kQueryParts) loaded.load(a, rows, warp);
  uint8_t* ring = shared->ring[warp];
  DecodeStream<Traits> stream(p, req, rows.kv_head, begin + warp, end, sight.stored, shared->stream,
                              ring);
  const bool has_window = warp == Traits::kWarps - 1 && end * Traits::kBatchTokens > sight.window;
  WindowUnits<Traits> window(p, req, has_window);
  stream.look_up();
  const int first_token = begin * Traits::kBatchTokens, end_token = end * Traits::kBatchTokens;
  const SpanRange spans =
      SpanRange::of(reads_copies ? min(first_token, sight.window) : first_token, end_token);
  SpanScorer<Traits> scorer(a, rows.kv_head, spans);
  prepare_stream<Traits>(a, &shared->stream);
  __syncthreads();
  stream.locate();
  window.look_up();
  stream.fetch(0, 0);
  if (has_window) window.share(rows.kv_head, reads_copies, shared->window);
  for (int part = warp; part < Traits::kQueryParts; part += Traits::kWarps) {
    if (part != warp) loaded.load(a, rows, part);
    share_query<Traits>(a, loaded, part, &shared->query);
  }
  __syncthreads();
  const auto fetch_more = [&] {
    if (reads_copies) fetch_copies<Traits>(a, rows.kv_head, sight, shared->copies);
#pragma unroll
    for (int n = 1; n < Traits::kStages - 1; ++n) stream.fetch(n, n);
  };
  // A wide CTA has nothing else to do until the centers are there, which would wait behind codes.
  if constexpr (!Traits::kIsWide) fetch_more();
  for (int part = warp; part < Traits::kQueryParts; part += Traits::kWarps) {
    if (Traits::kQueryParts > Traits::kWarps) loaded.load(a, rows, part);
    prepare_query<Traits>(p, loaded, part, &shared->query);
  }
  scorer.score(p.scale_log2, shared);
  __syncthreads();
  if constexpr (Traits::kIsWide) fetch_more();
  const QueryOperands<Traits> query(shared->query);
  ScoreFactors<Traits> factors(*shared);

  // 2. Stream over the tokens.
  const uint2 tables = shared->stream.tables[threadIdx.x & 1];
  DecodeState<Traits> state;
  const int num_batches = stream.num_batches();
  for (int n = 0, slot = 0; n < num_batches; ++n) {
    stream.wait();
    stream.fetch(n + Traits::kStages - 1, slot > 0 ? slot - 1 : Traits::kStages - 1);
    const uint8_t* batch = ring + slot * Traits::kBatchBytes;
    slot = slot + 1 < Traits::kStages ? slot + 1 : 0;
    const int token = stream.token(n);
    factors.enter(shared->span_of(token));
    if (sight.all_see(token)) {
      attend_codes<Traits, Traits::kBatchUnits, false>(tables, batch, token, query, factors, sight,
                                                       state);
      continue;
    }
#pragma unroll 1
    for (int k = 0; k < Traits::kBatchUnits; ++k) {
      const int first = token + k * Traits::kUnitTokens;
      if (sight.is_copied(first)) continue;
      attend_codes<Traits, 1, true>(tables, batch + k * Traits::kUnitBytes, first, query, factors,
                                    sight, state);
    }
  }
  if (reads_copies) {
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    attend_copies<Traits>(a, rows.kv_head, query, sight, *shared, factors, state);
  }

  // 3. Write the partial result.
  const RowRange done = rows_from(p, shared->work, first_row);
  write_partial<Traits>({p, done, shared->only()}, blockIdx.x, state, shared);
  __syncthreads();  // shared memory is free for what comes next
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  TQ_DYNAMIC_SHARED(bytes);
  auto* shared = reinterpret_cast<typename Traits::Shared*>(bytes);
  const AttentionParams& a = p.attention;
  if (p.awaits_first) await_previous();
  const int split = blockIdx.x, kv_head = blockIdx.y, req = blockIdx.z;
  const int first_token = a.query_start_loc[req];
  const int query_len = a.query_start_loc[req + 1] - first_token;

  // Batches of this split, of those that any row sees; at least one for every warp, so that short
  // sequences use few splits.
  const int seq_len = a.seq_lens[req];
  const int first_batch = a.first_seen(seq_len, query_len, 0) / Traits::kBatchTokens;
  const int last_batch = (seq_len + Traits::kBatchTokens - 1) / Traits::kBatchTokens;
  const int num_batches = max(last_batch - first_batch, 0);
  const int share =
      max(p.num_splits.divide(num_batches + p.num_splits.value() - 1), Traits::kWarps);
  if (split > 0 && split * share >= num_batches) return;
  const int begin = first_batch + split * share,
            end = min(begin + share, first_batch + num_batches);

  typename Traits::Work work{first_token, query_len, begin, end, (num_batches + share - 1) / share};
  if (threadIdx.x == 0) shared->work = work;
  for (int first = 0; first < work.query_len * p.group_size.value(); first += Traits::kRows) {
    attend_tile<Traits>(p, work, first, shared);
    work = shared->work;
    const RowRange rows = rows_from(p, work, first);
    if (work.num_splits <= 1) combine_splits<Traits>({p, rows, shared->only()}, 1, shared);
  }
  await_previous();  // where there are no rows, too: what comes next counts on it
  if (work.num_splits <= 1) return;
  uint32_t* ticket = p.partials.tickets + req * a.cache.num_kv_heads + kv_head;
  if (!is_last(ticket, work.num_splits, &shared->is_last)) return;
  for (int first = 0; first < work.query_len * p.group_size.value(); first += Traits::kRows) {
    const RowRange rows = rows_from(p, work, first);
    combine_splits<Traits>({p, rows, nullptr}, work.num_splits, shared);
  }
}

template <typename Traits>
void launch_traits(DecodeParams p, int rows, bool overlaps, Stream stream) {
  const AttentionParams& a = p.attention;
  p.warps_per_row = Divisor(std::max(Traits::kWarps / rows, 1));
  launch(decode_kernel<Traits>, dim3(p.num_splits.value(), a.cache.num_kv_heads, a.num_reqs),
         Traits::kThreads, sizeof(typename Traits::Shared), static_cast<cudaStream_t>(stream), p,
         overlaps);
}

template <typename Traits>
Residency residency_traits() {
  static OncePerDevice ctas, overlaps;
  return {ctas.get([] {
            return resident_ctas(decode_kernel<Traits>, Traits::kThreads,
                                 sizeof(typename Traits::Shared));
          }),
          overlaps.get([] { return can_overlap(decode_kernel<Traits>); }) != 0};
}

// Call what is generic over a traits class with that of a plan.
template <int kHeadDim, typename Call>
auto with_traits(const DecodePlan& plan, const Call& call) {
  using Four = DecodeShapes<kHeadDim, 4>;
  using Eight = DecodeShapes<kHeadDim, 8>;
  if (plan.rows <= 4) {
    return plan.wide ? call(typename Four::Wide{}) : call(typename Four::Narrow{});
  }
  return plan.wide ? call(typename Eight::Wide{}) : call(typename Eight::Narrow{});
}

template <int kHeadDim>
void launch_decode(const DecodeParams& p, const DecodePlan& plan, bool overlaps, Stream stream) {
  with_traits<kHeadDim>(
      plan, [&](auto traits) { launch_traits<decltype(traits)>(p, plan.rows, overlaps, stream); });
}

template <int kHeadDim>
Residency residency(const DecodePlan& plan) {
  return with_traits<kHeadDim>(plan,
                               [](auto traits) { return residency_traits<decltype(traits)>(); });
}

}  // namespace tq::cuda
