// Split-KV paged decode attention over turboquant3 slots.
//
// Grid: [num_splits, num_kv_heads, num_reqs]. Every warp of a CTA is a flash-decoding stream of its
// own over batches of 32 tokens; the warps meet once, at the end. The CTA that is last of its
// request and KV head merges the splits.
// Score of a token: alpha * (<q1, C[i]> + rho * <q2, s>) + <q, o>    (reference.py: score_codes)
//   S[16 tokens x 8] = K[16 x d] Q^T[d x 8] in int8; a column pair is a row's high and low part.
// Output: (H D3)^T sum_t p_t beta_t C[i_t].
//   O^T[d x 8] += V^T[d x 16 tokens] P^T[16 x 8] in float16; a column is a query row.
// Reads each slot once for up to kRows query rows. Meant to be bound by these bytes; decoding the
// codes keeps the integer pipe about as busy: two instructions a coordinate, most of them integer.
// The order of additions is fixed, so equal inputs give equal bits.
#pragma once

#include <atomic>
#include <cfloat>

#include "cuda/codes.cuh"
#include "cuda/decode_merge.cuh"
#include "cuda/decode_query.cuh"
#include "cuda/decode_stream.cuh"
#include "cuda/decode_traits.cuh"
#include "cuda/launch.cuh"

namespace tq::cuda {

// The running maximum may lag by this much (log2), so that most batches need no rescaling.
inline constexpr float kMaxLag = 8.0f;
// Room for growth of beta before it forces a rescaling.
inline constexpr float kValueHeadroom = 4.0f;

// Scores and value scales of one unit.
template <typename Traits>
struct UnitScores {
  float score[Traits::kKeyTiles][2];  // log2, tokens g and g + 8
  float beta[Traits::kNumGroups][2];  // of the same tokens
};

// What makes the integer products of this lane's rows, 4 i + t, scores.
template <typename Traits>
struct ScoreFactors {
  float unit[Traits::kKeyTiles][Traits::kNumGroups];
  int32_t base[Traits::kKeyTiles][Traits::kNumGroups];
  float sink[Traits::kKeyTiles][Traits::kNumGroups];  // for keys that start there

  __device__ explicit ScoreFactors(const typename Traits::Query& query) {
#pragma unroll
    for (int i = 0; i < Traits::kKeyTiles; ++i) {
      const int row = 4 * i + (threadIdx.x & 3);
#pragma unroll
      for (int g = 0; g < Traits::kNumGroups; ++g) {
        unit[i][g] = query.unit[row][g];
        base[i][g] = query.base[row][g];
        sink[i][g] = query.sink[row][g];
      }
    }
  }
};

// Operands of the keys' products: registers where they fit, else read again from shared memory.
template <typename Traits>
class QueryOperands {
 public:
  static constexpr bool kInRegisters =
      Traits::kNumGroups * Traits::kKeyTiles * Traits::kProducts <= 8;
  static constexpr int kCount = kInRegisters ? Traits::kNumGroups * Traits::kProducts * 2 : 1;

  __device__ explicit QueryOperands(const typename Traits::Query& query) : query_(query) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int g = i / (Traits::kProducts * 2), j = i / 2 % Traits::kProducts;
#pragma unroll
        for (int tile = 0; tile < Traits::kKeyTiles; ++tile) {
          index_[i][tile] = read(query_.index[g][j][i % 2], tile);
          sign_[i][tile] = read(query_.sign[g][j][i % 2], tile);
        }
      }
    }
  }
  __device__ uint32_t index(int g, int j, int half, int tile) const {
    if constexpr (kInRegisters) return index_[(g * Traits::kProducts + j) * 2 + half][tile];
    return read(query_.index[g][j][half], tile);
  }
  __device__ uint32_t sign(int g, int j, int half, int tile) const {
    if constexpr (kInRegisters) return sign_[(g * Traits::kProducts + j) * 2 + half][tile];
    return read(query_.sign[g][j][half], tile);
  }

 private:
  using Columns = const uint8_t (&)[Traits::kKeyTiles * 8][4][4];
  __device__ static uint32_t read(Columns columns, int tile) {
    const int lane = threadIdx.x & 31;
    return *reinterpret_cast<const uint32_t*>(columns[tile * 8 + lane / 4][lane % 4]);
  }

  const typename Traits::Query& query_;
  uint32_t index_[kCount][Traits::kKeyTiles], sign_[kCount][Traits::kKeyTiles];
};

// Codes of one token's quarter of a key group: index words, and sign words as expand_signs wants
// them.
template <typename Traits>
struct KeyWords {
  static constexpr int kIndexWords = Traits::kGroup / 64;
  uint32_t index[kIndexWords];
  uint32_t sign[kIndexWords];  // expanded twice: as it is, and with the low half bytes moved up

  __device__ KeyWords(const uint8_t* unit, int g, int token) {
    const int t = threadIdx.x & 3;
    const uint8_t* codes = unit + token * (Traits::kHeadDim / 4) + g * (Traits::kGroup / 4);
    const uint8_t* signs =
        unit + Traits::kKeySignAt + token * (Traits::kHeadDim / 8) + g * (Traits::kGroup / 8);
    if constexpr (Traits::kGroup == 128) {
      const uint2 words = reinterpret_cast<const uint2*>(codes)[t];
      index[0] = words.x, index[1] = words.y;
      sign[0] = reinterpret_cast<const uint32_t*>(signs)[t];
      sign[1] = sign[0] << 4;
    } else {
      index[0] = reinterpret_cast<const uint32_t*>(codes)[t];
      const uint32_t word = reinterpret_cast<const uint16_t*>(signs)[t];
      sign[0] = __byte_perm(word, word << 4, 0x5410);
    }
  }
};

__device__ inline float read_scale(const uint8_t* scales, int token) {
  return __half2float(reinterpret_cast<const __half*>(scales)[token]);
}

template <typename Traits>
__device__ inline void score_unit(uint32_t table, const uint8_t* unit,
                                  const QueryOperands<Traits>& query,
                                  const ScoreFactors<Traits>& factors, UnitScores<Traits>* out) {
  const int g8 = (threadIdx.x & 31) / 4;
#pragma unroll
  for (int g = 0; g < Traits::kNumGroups; ++g) {
    const KeyWords<Traits> low(unit, g, g8), high(unit, g, g8 + 8);
    int32_t product[Traits::kKeyTiles][4];
#pragma unroll
    for (int tile = 0; tile < Traits::kKeyTiles; ++tile) {
      product[tile][0] = product[tile][2] = 0;
      product[tile][1] = product[tile][3] = factors.base[tile][g];
    }
#pragma unroll
    for (int w = 0; w < KeyWords<Traits>::kIndexWords; ++w) {
      uint32_t a[4], b[4], c[4], d[4];
      expand_index(table, low.index[w], a);
      expand_index(table, high.index[w], b);
      expand_signs(low.sign[w], c);
      expand_signs(high.sign[w], d);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int j = 2 * w + i;
#pragma unroll
        for (int tile = 0; tile < Traits::kKeyTiles; ++tile) {
          mma_int8(product[tile], a[2 * i], b[2 * i], a[2 * i + 1], b[2 * i + 1],
                   query.index(g, j, 0, tile), query.index(g, j, 1, tile));
          mma_int8(product[tile], c[2 * i], d[2 * i], c[2 * i + 1], d[2 * i + 1],
                   query.sign(g, j, 0, tile), query.sign(g, j, 1, tile));
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = g8 + 8 * h;
      const float alpha =
          read_scale(unit + Traits::kKeyScaleAt + g * Traits::kScaleRowBytes, token);
      out->beta[g][h] =
          read_scale(unit + Traits::kValueScaleAt + g * Traits::kScaleRowBytes, token);
#pragma unroll
      for (int tile = 0; tile < Traits::kKeyTiles; ++tile) {
        const int32_t sum = product[tile][2 * h] * 128 + product[tile][2 * h + 1];
        const float origin = signbit(alpha) ? factors.sink[tile][g] : 0.0f;
        const float score =
            fmaf(fabsf(alpha), static_cast<float>(sum) * factors.unit[tile][g], origin);
        out->score[tile][h] = g == 0 ? score : out->score[tile][h] + score;
      }
    }
  }
}

// Raise the maximum and the value scale to what the batch needs, and shrink what was summed.
template <typename Traits>
__device__ inline void rescale(const float (&score_max)[Traits::kKeyTiles], float beta_max,
                               DecodeState<Traits>& state) {
  const int lane = threadIdx.x & 31, t = lane % 4;
  float shrink[Traits::kKeyTiles];
#pragma unroll
  for (int i = 0; i < Traits::kKeyTiles; ++i) {
    float max = score_max[i];
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, mask));
    }
    max = fmaxf(max, state.max[i]);
    shrink[i] = exp2_approx(state.max[i] - max);
    state.max[i] = max;
    state.sum[i] *= shrink[i];
  }
  float factor = 1.0f;
  beta_max = warp_max(beta_max);
  if (beta_max > state.value_scale) {
    factor = state.value_scale / (beta_max * kValueHeadroom);
    state.value_scale = beta_max * kValueHeadroom;
  }
  // Accumulator columns 2 t and 2 t + 1 are rows of that number; row r is in lane r % 4, tile r
  // / 4.
  const int source = 2 * t % 4;
  float even = __shfl_sync(kAllLanes, shrink[0], source);
  float odd = __shfl_sync(kAllLanes, shrink[0], source + 1);
  if constexpr (Traits::kKeyTiles == 2) {
    const float even1 = __shfl_sync(kAllLanes, shrink[1], source);
    const float odd1 = __shfl_sync(kAllLanes, shrink[1], source + 1);
    if (t >= 2) even = even1, odd = odd1;
  }
  even *= factor, odd *= factor;
#pragma unroll
  for (auto& group : state.out) {
#pragma unroll
    for (auto& word : group) {
#pragma unroll
      for (auto& tile : word) tile[0] *= even, tile[1] *= odd, tile[2] *= even, tile[3] *= odd;
    }
  }
}

// Add the values of one unit, weighted. p: of this lane's rows and tokens g, g + 8.
template <typename Traits>
__device__ inline void add_values(uint32_t table, const uint8_t* unit,
                                  const float (&p)[Traits::kKeyTiles][2],
                                  const float (&beta)[Traits::kNumGroups][2], float inverse,
                                  DecodeState<Traits>& state) {
  const int lane = threadIdx.x & 31, g8 = lane / 4, t = lane % 4;
  // Column g of the weights is row g; its k are tokens t, t + 8, t + 4, t + 12.
  const int source = 4 * t + g8 % 4;
#pragma unroll
  for (int g = 0; g < Traits::kNumGroups; ++g) {
    const float scale0 = beta[g][0] * inverse, scale1 = beta[g][1] * inverse;
    uint32_t weights = pack_half2(p[0][0] * scale0, p[0][1] * scale1);
    uint32_t b0 = __shfl_sync(kAllLanes, weights, source);
    uint32_t b1 = __shfl_sync(kAllLanes, weights, source + 16);
    if constexpr (Traits::kKeyTiles == 2) {
      weights = pack_half2(p[1][0] * scale0, p[1][1] * scale1);
      const uint32_t upper0 = __shfl_sync(kAllLanes, weights, source);
      const uint32_t upper1 = __shfl_sync(kAllLanes, weights, source + 16);
      if (g8 >= 4) b0 = upper0, b1 = upper1;
    }
    uint32_t words[4];  // of tokens t, t + 4, t + 8, t + 12
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* codes = unit + Traits::kValueIndexAt + (t + 4 * i) * (Traits::kHeadDim / 4) +
                             g * (Traits::kGroup / 4);
      words[i] = Traits::kGroup == 128 ? reinterpret_cast<const uint32_t*>(codes)[g8]
                                       : reinterpret_cast<const uint16_t*>(codes)[g8];
    }
#pragma unroll
    for (int w = 0; w < Traits::kValueWords; ++w) {
      uint32_t x[8], y[8];
      const uint32_t selector = w == 0 ? 0x5140 : 0x7362;
      expand_values(table, __byte_perm(words[0], words[2], selector), x);
      expand_values(table, __byte_perm(words[1], words[3], selector), y);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = 4 * (i >> 1) + (i & 1);
        mma_half(state.out[g][w][i], x[c], x[c + 2], y[c], y[c + 2], b0, b1);
      }
    }
  }
}

// Score and weigh one batch. limit[i]: tokens of this batch that row 4 i + t sees, if kMasked.
template <typename Traits, bool kMasked>
__device__ inline void attend_batch(const uint2& tables, const uint8_t* batch,
                                    const QueryOperands<Traits>& query,
                                    const ScoreFactors<Traits>& factors,
                                    const int (&limit)[Traits::kKeyTiles], int num_tokens,
                                    DecodeState<Traits>& state) {
  const int g8 = (threadIdx.x & 31) / 4;
  UnitScores<Traits> units[Traits::kBatchUnits];
  float score_max[Traits::kKeyTiles], beta_max = 0.0f;
#pragma unroll
  for (int i = 0; i < Traits::kKeyTiles; ++i) score_max[i] = -FLT_MAX;
#pragma unroll
  for (int k = 0; k < Traits::kBatchUnits; ++k) {
    score_unit<Traits>(tables.x, batch + k * Traits::kUnitBytes, query, factors, &units[k]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = k * Traits::kUnitTokens + g8 + 8 * h;
#pragma unroll
      for (int g = 0; g < Traits::kNumGroups; ++g) {
        // NOTE: past the end the scale may be NaN, which a weight of 0 would not silence.
        if (kMasked && token >= num_tokens) units[k].beta[g][h] = 0.0f;
        beta_max = fmaxf(beta_max, units[k].beta[g][h]);
      }
#pragma unroll
      for (int i = 0; i < Traits::kKeyTiles; ++i) {
        if (kMasked && token >= limit[i]) units[k].score[i][h] = -INFINITY;
        score_max[i] = fmaxf(score_max[i], units[k].score[i][h]);
      }
    }
  }
  bool grows = beta_max > state.value_scale;
#pragma unroll
  for (int i = 0; i < Traits::kKeyTiles; ++i) grows |= score_max[i] > state.max[i] + kMaxLag;
  if (__any_sync(kAllLanes, grows)) rescale<Traits>(score_max, beta_max, state);

  const float inverse = __fdividef(kWeightScale, state.value_scale);
#pragma unroll
  for (int k = 0; k < Traits::kBatchUnits; ++k) {
    float p[Traits::kKeyTiles][2];
#pragma unroll
    for (int i = 0; i < Traits::kKeyTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        p[i][h] = exp2_approx(units[k].score[i][h] - state.max[i]);
        state.sum[i] += p[i][h];
      }
    }
    add_values<Traits>(tables.y, batch + k * Traits::kUnitBytes, p, units[k].beta, inverse, state);
  }
}

// Attend one tile of rows to batches [begin, end).
template <typename Traits>
__device__ inline void attend_tile(const TilePartials<Traits>& partials, int req, int split,
                                   int begin, int end, typename Traits::Shared* shared) {
  const DecodeParams& p = partials.p;
  const RowRange& rows = partials.rows;
  const AttentionParams& a = p.attention;
  const int warp = threadIdx.x / 32, t = threadIdx.x & 3;
  const int seq_len = a.seq_lens[req];

  // 1. Start reading, then prepare the queries while the bytes are on their way.
  prepare_stream<Traits>(a, &shared->stream);
  __syncthreads();
  uint8_t* ring = shared->ring[warp];
  DecodeStream<Traits> stream(a, req, rows.kv_head, begin + warp, end, shared->stream, ring);
#pragma unroll
  for (int n = 0; n < Traits::kEarlyStages; ++n) stream.fetch(n, n);
  for (int i = warp; i < Traits::kRows * Traits::kNumGroups; i += Traits::kWarps) {
    prepare_query<Traits>(p, rows, i / Traits::kNumGroups, i % Traits::kNumGroups, &shared->query);
  }
  __syncthreads();
#pragma unroll
  for (int n = Traits::kEarlyStages; n < Traits::kStages - 1; ++n) stream.fetch(n, n);
  const QueryOperands<Traits> query(shared->query);
  const ScoreFactors<Traits> factors(shared->query);
  int visible[Traits::kKeyTiles], fewest = seq_len;  // tokens that a row sees
#pragma unroll
  for (int i = 0; i < Traits::kKeyTiles; ++i) {
    const int row = 4 * i + t;
    const int query_len = rows.num_rows / rows.group_size;
    const int hidden = query_len - 1 - (rows.first_row + row) / rows.group_size;
    visible[i] = a.causal ? seq_len - max(hidden, 0) : seq_len;
    fewest = min(fewest, visible[i]);
  }

  fewest = __reduce_min_sync(kAllLanes, fewest);

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
    int limit[Traits::kKeyTiles];
#pragma unroll
    for (int i = 0; i < Traits::kKeyTiles; ++i) limit[i] = visible[i] - token;
    if (token + Traits::kBatchTokens > fewest) {
      attend_batch<Traits, true>(tables, batch, query, factors, limit, seq_len - token, state);
    } else {
      attend_batch<Traits, false>(tables, batch, query, factors, limit, seq_len - token, state);
    }
  }
  cp_async_wait<0>();

  // 3. Write the partial result.
  write_partial<Traits>(partials, split, state, shared);
  __syncthreads();  // shared memory is free for what comes next
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    decode_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) uint8_t bytes[];
  auto* shared = reinterpret_cast<typename Traits::Shared*>(bytes);
  const AttentionParams& a = p.attention;
  const int split = blockIdx.x, kv_head = blockIdx.y, req = blockIdx.z;
  const int first_token = a.query_start_loc[req];
  const int group_size = a.num_heads / a.cache.num_kv_heads;
  const int num_rows = (a.query_start_loc[req + 1] - first_token) * group_size;

  // Batches of this split; at least one for every warp, so that short sequences use few splits.
  const int num_batches = (a.seq_lens[req] + Traits::kBatchTokens - 1) / Traits::kBatchTokens;
  const int share = max((num_batches + p.num_splits - 1) / p.num_splits, Traits::kWarps);
  const int num_splits = max((num_batches + share - 1) / share, 1);
  const int begin = split * share, end = min(begin + share, num_batches);
  if (split >= num_splits) return;

  const bool only = num_splits == 1;
  for (int first = 0; first < num_rows; first += Traits::kRows) {
    const RowRange rows{first_token, kv_head, group_size, first, num_rows};
    const TilePartials<Traits> partials{p, rows, only ? &shared->combine : nullptr};
    attend_tile<Traits>(partials, req, split, begin, end, shared);
    if (only) combine_splits<Traits>(partials, 1, shared);
  }
  uint32_t* ticket = p.partials.tickets + req * a.cache.num_kv_heads + kv_head;
  if (only || !is_last(ticket, num_splits, &shared->is_last)) return;
  for (int first = 0; first < num_rows; first += Traits::kRows) {
    const RowRange rows{first_token, kv_head, group_size, first, num_rows};
    combine_splits<Traits>({p, rows, nullptr}, num_splits, shared);
  }
}

template <typename Traits>
void launch_traits(const DecodeParams& p, Stream stream) {
  const AttentionParams& a = p.attention;
  launch(decode_kernel<Traits>, dim3(p.num_splits, a.cache.num_kv_heads, a.num_reqs),
         Traits::kThreads, sizeof(typename Traits::Shared), static_cast<cudaStream_t>(stream), p);
}

template <typename Traits>
int resident_traits() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // of a device, plus one; 0: not asked yet
  int device = 0;
  TQ_CUDA_CHECK(cudaGetDevice(&device));
  std::atomic<int>& slot = known[device % kDevices];
  if (slot.load(std::memory_order_relaxed) == 0) {
    const int shared_bytes = sizeof(typename Traits::Shared);
    slot.store(1 + resident_ctas(decode_kernel<Traits>, Traits::kThreads, shared_bytes),
               std::memory_order_relaxed);
  }
  return slot.load(std::memory_order_relaxed) - 1;
}

template <int kHeadDim>
void launch_decode(const DecodeParams& p, const DecodePlan& plan, Stream stream) {
  using Four = DecodeShapes<kHeadDim, 4>;
  using Eight = DecodeShapes<kHeadDim, 8>;
  if (plan.rows_per_tile == 4) {
    plan.wide ? launch_traits<typename Four::Wide>(p, stream)
              : launch_traits<typename Four::Narrow>(p, stream);
  } else {
    plan.wide ? launch_traits<typename Eight::Wide>(p, stream)
              : launch_traits<typename Eight::Narrow>(p, stream);
  }
}

template <int kHeadDim>
int resident_decode(const DecodePlan& plan) {
  using Four = DecodeShapes<kHeadDim, 4>;
  using Eight = DecodeShapes<kHeadDim, 8>;
  if (plan.rows_per_tile == 4) {
    return plan.wide ? resident_traits<typename Four::Wide>()
                     : resident_traits<typename Four::Narrow>();
  }
  return plan.wide ? resident_traits<typename Eight::Wide>()
                   : resident_traits<typename Eight::Narrow>();
}

}  // namespace tq::cuda
