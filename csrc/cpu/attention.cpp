// Paged decode attention over codes.
//
// Work items: (request, KV head, tile of query rows, split of the tokens). A row is one query head
// of one query token; the rows of a KV head share every decoded code. Tokens stand in lanes for the
// scores and coordinates for the output, so that neither needs a horizontal sum. Score: alpha (<q1,
// C[i]> + rho <q2, s>); output: (H D3)^T sum_t p_t beta_t C[i_t]   (reference.py) Reads slot_bytes
// per token and KV head and row tile; compute-bound, about 3 instructions per coordinate and row,
// sixteen lanes each. Partial results of the splits are merged by log-sum-exp.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/codes.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"

namespace tq::cpu {
namespace {

constexpr int kRowTile = 32;    // query rows that share a pass over the tokens
constexpr int kRowStep = 8;     // rows whose accumulators fit into registers
constexpr int kTokenTile = 64;  // tokens between two updates of the running maximum
constexpr int kRowGrain = 128;  // rows to rotate or merge that pay for another thread
constexpr int kMinSplit = 256;  // tokens that pay for a partial result
constexpr float kNoScore = -std::numeric_limits<float>::infinity();

// Rotated queries of one (token, head), softmax scale included.
struct Queries {
  std::unique_ptr<float[]> q1;    // [num_tokens, num_heads, head_dim], scale * q1
  std::unique_ptr<float[]> q2;    // as q1, 2 rho scale * q2: a sign bit b stands for 2 b - 1
  std::unique_ptr<float[]> base;  // [num_tokens, num_heads, num_groups], what all bits 0 give
  std::unique_ptr<float[]> bias;  // [num_tokens, num_heads], scale * <q, center>
};

// Rows of one KV head of one request, and where their partial results are.
struct Tile {
  int req, kv_head, first_row, num_rows;
  int64_t num_tokens;  // visible to the last row
  int first_split, num_splits;
  int64_t split_tokens;
};

// Partial result of rows over some tokens: running maximum, sum and unnormalized output.
struct Partial {
  float max[kRowTile], sum[kRowTile];
  float* out;  // [num_rows, head_dim], in the rotated space of values
};

struct Problem {
  const AttentionParams& p;
  Queries queries;
  std::vector<Tile> tiles;
  std::vector<Partial> partials;
  std::vector<int> tile_of_split;
  std::unique_ptr<float[]> out;

  int group_size() const { return p.num_heads / p.cache.num_kv_heads; }
  int64_t query_row(const Tile& tile, int row) const {  // index of a row's (token, head)
    const int r = tile.first_row + row, size = group_size();
    return int64_t{p.query_start_loc[tile.req] + r / size} * p.num_heads +
           int64_t{tile.kv_head} * size + r % size;
  }
  // Tokens that a row sees.
  int64_t visible(const Tile& tile, int row) const {
    const int64_t seq_len = p.seq_lens[tile.req];
    if (!p.causal) return seq_len;
    const int query_len = p.query_start_loc[tile.req + 1] - p.query_start_loc[tile.req];
    return std::max<int64_t>(0, seq_len - query_len + (tile.first_row + row) / group_size() + 1);
  }
};

template <int kGroup>
void rotate_query(Problem& problem, int64_t token, int head) {
  using Book = Codebook<kGroup>;
  const AttentionParams& p = problem.p;
  const int head_dim = p.cache.layout.head_dim, num_groups = p.cache.layout.num_groups();
  const int64_t row = token * p.num_heads + head;
  const float* center = p.center + int64_t{head} / problem.group_size() * head_dim;
  float bias = 0;
  for (int g = 0; g < num_groups; ++g) {
    float q[kGroup];
    float* q1 = &problem.queries.q1[row * head_dim + g * kGroup];
    float* q2 = &problem.queries.q2[row * head_dim + g * kGroup];
    read_row(p.query, token, head, g * kGroup, kGroup, q);
    for (int j = 0; j < kGroup; ++j) {
      bias += q[j] * center[g * kGroup + j];
      q1[j] = q[j] * kKeySigns[j];
    }
    hadamard<kGroup>(q1);
    for (int j = 0; j < kGroup; ++j) {
      q1[j] *= p.scale / Book::kRoot;
      q2[j] = q1[j] * kResidualSigns[j];
    }
    hadamard<kGroup>(q2);
    float sum = 0;
    for (int j = 0; j < kGroup; ++j) sum += q2[j] *= 2 * Book::kQjlWeight;
    problem.queries.base[row * num_groups + g] = -sum / 2;
  }
  problem.queries.bias[row] = bias * p.scale;
}

// Add <q1, C[i]> + <q2, b> of kRows rows to scores[kRows] of sixteen tokens.
template <int kGroup, int kRows>
void score_codes(const KeyWords<kGroup>& key, const float* const* q1, const float* const* q2,
                 Lanes* scores) {
  Lanes by_index[kRows], by_sign[kRows];
  for (int r = 0; r < kRows; ++r) by_index[r] = scores[r], by_sign[r] = splat(0.0f);
  for (int w = 0; w < kGroup / 16; ++w) {
    const Words index = key.index[w], sign = key.sign[w / 2] >> (w % 2 * 16);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      const Lanes c = centroid<kGroup>(index >> (2 * j));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        by_index[r] = fma(c, splat(q1[r][w * 16 + j]), by_index[r]);
        by_sign[r] = add_where_bit(by_sign[r], sign, j, splat(q2[r][w * 16 + j]));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) scores[r] = by_index[r] + by_sign[r];
}

// Set scores[kRows] of sixteen tokens to <q1, u^>.
template <int kGroup, int kRows>
void score_decoded(const Lanes* key, const float* const* q1, Lanes* scores) {
  Lanes sum[kRows];
  for (int r = 0; r < kRows; ++r) sum[r] = splat(0.0f);
  for (int j = 0; j < kGroup; ++j) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] = fma(key[j], splat(q1[r][j]), sum[r]);
  }
  for (int r = 0; r < kRows; ++r) scores[r] = sum[r];
}

// Add weights[kRows][sixteen tokens] times their centroids to out[kRows][kGroup].
template <int kGroup, int kRows>
void add_values(const uint8_t* index, int stride_bytes, const float* const* weights,
                float* const* out) {
  for (int w = 0; w < kGroup / 16; ++w) {
    Lanes even[kRows], odd[kRows];  // two chains hide the latency of the fused multiply-add
    for (int r = 0; r < kRows; ++r) even[r] = load(out[r] + w * 16), odd[r] = splat(0.0f);
    for (int t = 0; t < kLanes; t += 2) {
      const Lanes c0 = centroid<kGroup>(spread_indices(index + t * stride_bytes + w * 4));
      const Lanes c1 = centroid<kGroup>(spread_indices(index + (t + 1) * stride_bytes + w * 4));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        even[r] = fma(c0, splat(weights[r][t]), even[r]);
        odd[r] = fma(c1, splat(weights[r][t + 1]), odd[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) store(out[r] + w * 16, even[r] + odd[r]);
  }
}

// Call body(std::integral_constant<int, rows>, first_row) for steps of at most kRowStep rows.
template <typename Body>
void for_row_steps(int num_rows, const Body& body) {
  for (int first = 0; first < num_rows; first += kRowStep) {
    switch (std::min(kRowStep, num_rows - first)) {
      case 1:
        body(std::integral_constant<int, 1>(), first);
        break;
      case 2:
        body(std::integral_constant<int, 2>(), first);
        break;
      case 3:
        body(std::integral_constant<int, 3>(), first);
        break;
      case 4:
        body(std::integral_constant<int, 4>(), first);
        break;
      case 5:
        body(std::integral_constant<int, 5>(), first);
        break;
      case 6:
        body(std::integral_constant<int, 6>(), first);
        break;
      case 7:
        body(std::integral_constant<int, 7>(), first);
        break;
      case 8:
        body(std::integral_constant<int, 8>(), first);
        break;
    }
  }
}

// Attend the rows of a tile to tokens [begin, end); begin is a multiple of sixteen.
template <int kGroup>
class TilePass {
 public:
  TilePass(const Problem& problem, const Tile& tile, int64_t begin, int64_t end, Partial* partial)
      : problem_(problem),
        p_(problem.p),
        tile_(tile),
        layout_(p_.cache.layout),
        at_(layout_.offsets(p_.cache.block_size)),
        blocks_(p_.block_table.data + tile.req * p_.block_table.req_stride),
        begin_(begin),
        end_(end),
        partial_(partial) {}

  void run() {
    for (int r = 0; r < tile_.num_rows; ++r) partial_->max[r] = kNoScore, partial_->sum[r] = 0;
    std::fill_n(partial_->out, tile_.num_rows * layout_.head_dim, 0.0f);
    for (int64_t token = begin_; token < end_; token += kTokenTile) {
      const int num_units =
          static_cast<int>((std::min<int64_t>(kTokenTile, end_ - token) + kLanes - 1) / kLanes);
      score(token, num_units);
      weigh(token, num_units);
      accumulate(token, num_units);
    }
  }

 private:
  // 1. Scores of every row and token of the tile of tokens.
  void score(int64_t token, int num_units) {
    const int num_groups = layout_.num_groups();
    for (int u = 0; u < num_units; ++u) {
      const Unit unit = locate(p_.cache, blocks_, tile_.kv_head, token + u * kLanes);
      for (int g = 0; g < num_groups; ++g) {
        const KeyWords<kGroup> key(unit, layout_, at_, g);
        const Lanes alpha = load_scales(unit, at_.key_scale, g, p_.cache.block_size);
        Lanes decoded[kGroup];
        // Decoding signs costs a transform, which pays once enough rows share it.
        const bool decode = tile_.num_rows > kRowStep;
        if (decode) key.decode(decoded);
        for_row_steps(tile_.num_rows, [&](auto rows, int first) {
          constexpr int kRows = decltype(rows)::value;
          const float *q1[kRows], *q2[kRows];
          Lanes dot[kRows];
          for (int r = 0; r < kRows; ++r) {
            const int64_t row = problem_.query_row(tile_, first + r);
            q1[r] = &problem_.queries.q1[row * layout_.head_dim + g * kGroup];
            q2[r] = &problem_.queries.q2[row * layout_.head_dim + g * kGroup];
            dot[r] = splat(problem_.queries.base[row * num_groups + g]);
          }
          if (decode) {
            score_decoded<kGroup, kRows>(decoded, q1, dot);
          } else {
            score_codes<kGroup, kRows>(key, q1, q2, dot);
          }
          for (int r = 0; r < kRows; ++r) {
            float* scores = &weights_[first + r][u * kLanes];
            const Lanes before = g == 0 ? splat(0.0f) : load(scores);
            store(scores, fma(alpha, dot[r], before));
          }
        });
      }
    }
  }

  // 2. Mask, update the running maximum and sum, and turn scores into weights.
  void weigh(int64_t token, int num_units) {
    for (int r = 0; r < tile_.num_rows; ++r) {
      float* row = weights_[r];
      const int64_t seen = std::min(end_, problem_.visible(tile_, r)) - token;
      for (int64_t i = std::max<int64_t>(0, seen); i < num_units * kLanes; ++i) row[i] = kNoScore;
      Lanes max = load(row);
      for (int u = 1; u < num_units; ++u) {
        const Lanes scores = load(row + u * kLanes);
        max = where(scores > max, scores, max);
      }
      const float before = partial_->max[r], after = std::max(before, reduce_max(max));
      if (after == kNoScore) {
        std::fill_n(row, num_units * kLanes, 0.0f);
        continue;
      }
      Lanes sum = splat(0.0f);
      for (int u = 0; u < num_units; ++u) {
        const Lanes weight = exp_nonpositive(load(row + u * kLanes) - splat(after));
        store(row + u * kLanes, weight);
        sum = sum + weight;
      }
      const float shrink = std::exp(before - after);
      partial_->max[r] = after;
      partial_->sum[r] = partial_->sum[r] * shrink + reduce_add(sum);
      if (after > before) {
        float* out = partial_->out + r * layout_.head_dim;
        for (int j = 0; j < layout_.head_dim; ++j) out[j] *= shrink;
      }
    }
  }

  // 3. Add the weighted values.
  void accumulate(int64_t token, int num_units) {
    for (int u = 0; u < num_units; ++u) {
      const Unit unit = locate(p_.cache, blocks_, tile_.kv_head, token + u * kLanes);
      const int64_t left = end_ - token - u * kLanes;
      for (int g = 0; g < layout_.num_groups(); ++g) {
        float beta[kLanes];
        store(beta, load_scales(unit, at_.value_scale, g, p_.cache.block_size));
        // NOTE: past the end the scale may be NaN, which a weight of 0 would not silence.
        for (int64_t t = left; t < kLanes; ++t) beta[t] = 0;
        const uint8_t* index = unit.region + at_.value_index + g * kGroup / 4 +
                               int64_t{unit.offset} * layout_.index_bytes();
        for_row_steps(tile_.num_rows, [&](auto rows, int first) {
          constexpr int kRows = decltype(rows)::value;
          alignas(64) float scaled[kRows][kLanes];
          const float* weights[kRows];
          float* out[kRows];
          for (int r = 0; r < kRows; ++r) {
            store(scaled[r], load(&weights_[first + r][u * kLanes]) * load(beta));
            weights[r] = scaled[r];
            out[r] = partial_->out + (first + r) * layout_.head_dim + g * kGroup;
          }
          add_values<kGroup, kRows>(index, layout_.index_bytes(), weights, out);
        });
      }
    }
  }

  const Problem& problem_;
  const AttentionParams& p_;
  const Tile& tile_;
  const SlotLayout layout_;
  const BlockOffsets at_;
  const int32_t* blocks_;
  const int64_t begin_, end_;
  Partial* partial_;
  alignas(64) float weights_[kRowTile][kTokenTile];  // scores, then weights
};

// Merge the splits of one tile, rotate the values back, and write output and log-sum-exp.
template <int kGroup>
void finish_tile(const Problem& problem, const Tile& tile) {
  const AttentionParams& p = problem.p;
  const int head_dim = p.cache.layout.head_dim;
  for (int r = 0; r < tile.num_rows; ++r) {
    const int64_t row = problem.query_row(tile, r);
    const int64_t token = row / p.num_heads, head = row % p.num_heads;
    const Partial* splits = &problem.partials[tile.first_split];
    float max = kNoScore, sum = 0, out[kMaxHeadDim] = {};
    for (int s = 0; s < tile.num_splits; ++s) max = std::max(max, splits[s].max[r]);
    for (int s = 0; s < tile.num_splits; ++s) {
      if (splits[s].max[r] == kNoScore) continue;
      const float weight = std::exp(splits[s].max[r] - max);
      sum += weight * splits[s].sum[r];
      for (int j = 0; j < head_dim; ++j) out[j] += weight * splits[s].out[r * head_dim + j];
    }
    p.lse[head * p.lse_stride + token] =
        max == kNoScore ? kNoScore : max + std::log(sum) + problem.queries.bias[row];
    const float scale = sum > 0 ? 1 / (sum * Codebook<kGroup>::kRoot) : 0;
    for (int g = 0; g < p.cache.layout.num_groups(); ++g) {
      hadamard<kGroup>(out + g * kGroup);
      for (int j = 0; j < kGroup; ++j) out[g * kGroup + j] *= scale * kValueSigns[j];
    }
    write_row(p.out, token, head, 0, head_dim, out);
  }
}

// Cut the batch into tiles of rows and these into splits of tokens of about equal cost.
void plan(Problem& problem, int num_threads) {
  const AttentionParams& p = problem.p;
  constexpr int kSharedCost = 8;  // decoding, in rows
  int64_t total = 0, num_rows = 0;
  for (int req = 0; req < p.num_reqs; ++req) {
    const int query_len = p.query_start_loc[req + 1] - p.query_start_loc[req];
    const int rows = query_len * problem.group_size();
    for (int head = 0; head < p.cache.num_kv_heads; ++head) {
      for (int first = 0; first < rows; first += kRowTile) {
        Tile tile{req, head, first, std::min(kRowTile, rows - first), 0, 0, 0, 0};
        tile.num_tokens = problem.visible(tile, tile.num_rows - 1);
        total += tile.num_tokens * (kSharedCost + tile.num_rows);
        problem.tiles.push_back(tile);
      }
    }
  }
  const double cost_each = static_cast<double>(total) / (4 * num_threads);
  for (size_t t = 0; t < problem.tiles.size(); ++t) {
    Tile& tile = problem.tiles[t];
    tile.first_split = static_cast<int>(problem.partials.size());
    if (tile.num_tokens == 0) continue;
    const double cost = static_cast<double>(tile.num_tokens) * (kSharedCost + tile.num_rows);
    const int64_t most = (tile.num_tokens + kMinSplit - 1) / kMinSplit;
    const int64_t splits =
        std::clamp<int64_t>(static_cast<int64_t>(cost / cost_each + 0.5), 1, most);
    tile.split_tokens = ((tile.num_tokens + splits - 1) / splits + kLanes - 1) / kLanes * kLanes;
    tile.num_splits =
        static_cast<int>((tile.num_tokens + tile.split_tokens - 1) / tile.split_tokens);
    num_rows += int64_t{tile.num_splits} * tile.num_rows;
    problem.partials.resize(problem.partials.size() + tile.num_splits);
    problem.tile_of_split.resize(problem.partials.size(), static_cast<int>(t));
  }
  const int head_dim = p.cache.layout.head_dim;
  problem.out.reset(new float[num_rows * head_dim]);
  float* next = problem.out.get();
  for (size_t s = 0; s < problem.partials.size(); ++s) {
    problem.partials[s].out = next;
    next += problem.tiles[problem.tile_of_split[s]].num_rows * head_dim;
  }
}

template <int kGroup>
void attend(const AttentionParams& p, const Threads& threads) {
  Problem problem{p, {}, {}, {}, {}, {}};
  const int64_t first_token = p.query_start_loc[0], last_token = p.query_start_loc[p.num_reqs];
  const int64_t num_rows = last_token * p.num_heads;
  const int head_dim = p.cache.layout.head_dim;
  problem.queries.q1.reset(new float[num_rows * head_dim]);
  problem.queries.q2.reset(new float[num_rows * head_dim]);
  problem.queries.base.reset(new float[num_rows * p.cache.layout.num_groups()]);
  problem.queries.bias.reset(new float[num_rows]);
  plan(problem, threads.count);

  threads.run((last_token - first_token) * p.num_heads, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      rotate_query<kGroup>(problem, first_token + i / p.num_heads,
                           static_cast<int>(i % p.num_heads));
    }
  });
  threads.run(static_cast<int64_t>(problem.partials.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const Tile& tile = problem.tiles[problem.tile_of_split[s]];
      const int64_t first = (s - tile.first_split) * tile.split_tokens;
      const int64_t last = std::min(tile.num_tokens, first + tile.split_tokens);
      TilePass<kGroup>(problem, tile, first, last, &problem.partials[s]).run();
    }
  });
  threads.run(static_cast<int64_t>(problem.tiles.size()), kRowGrain / kRowStep,
              [&](int64_t begin, int64_t end) {
                for (int64_t t = begin; t < end; ++t)
                  finish_tile<kGroup>(problem, problem.tiles[t]);
              });
}

}  // namespace

void paged_attention(const AttentionParams& params, const Threads& threads) {
  if (params.num_reqs == 0) return;
  if (params.cache.layout.group() == 64) {
    attend<64>(params, threads);
  } else {
    attend<128>(params, threads);
  }
}

}  // namespace tq::cpu
