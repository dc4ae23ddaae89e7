// Paged decode attention over codes.
//
// Work items: (request, KV head, tile of query rows, split of the tokens). Each walks its tokens in
// tiles that it decodes once for all rows, with an online softmax; CodeTile has the arithmetic for
// the instruction set. Partial results of the splits are merged by log-sum-exp.
//
// Score: alpha (<q1, C[i]> + rho <q2, s>) + <q, o>, o the sink or the center of the token's span;
// output: (H D3)^T sum_t p_t beta_t C[i_t]. Of <q, o> = <q, o - c> + <q, c>, with c the center of
// the frame, the second part is the same for all keys and enters the log-sum-exp at the end. The
// first is computed once per row for the sink and for every span; in a frame without spans, it is 0
// but for keys at the sink.
// Tokens in the window of a request that have 8-bit copies are scored, and their values added, from
// those: <q1, scale e> + <q, o> and sum_t p_t scale_t e_t. Their codes are decoded with the
// others', and get no weight. Source: reference.py, reference_recent.py. Reads slot_bytes per
// token, KV head and row tile; compute-bound.
#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/attention_plan.h"
#include "cpu/copies.h"
#include "cpu/kernels.h"
#include "cpu/rotate_row.h"
#include "cpu/rows.h"
#if defined(__AVX512VNNI__)
#include "cpu/codes_avx512.h"
#elif defined(__AVX2__) && !defined(__AVX512F__)
#include "cpu/codes_avx2.h"
#else
#include "cpu/codes_float.h"
#endif

namespace tq::cpu {
namespace {

// Rotated query rows of the batch, softmax scale included.
struct Queries {
  const Plan& plan;
  std::unique_ptr<float[]> q1;    // [num_tokens, num_heads, head_dim]
  std::unique_ptr<float[]> q2;    // as q1, times rho
  std::unique_ptr<float[]> bias;  // [num_tokens, num_heads], scale * <q, center>
  std::unique_ptr<float[]> sink;  // [num_tokens, num_heads, num_groups], scale * <q, sink - center>

  explicit Queries(const Plan& plan_) : plan(plan_) {
    const int64_t num_rows = int64_t{plan.p.query_start_loc[plan.p.num_reqs]} * plan.p.num_heads;
    const int64_t size = num_rows * plan.p.cache.layout.head_dim;
    q1.reset(new float[size]);
    q2.reset(new float[size]);
    bias.reset(new float[num_rows]);
    sink.reset(new float[num_rows * plan.p.cache.layout.num_groups()]);
  }

  template <int kGroup>
  void rotate(int64_t token, int head) {
    using Book = Codebook<kGroup>;
    const AttentionParams& p = plan.p;
    const int head_dim = p.cache.layout.head_dim;
    const int64_t row = token * p.num_heads + head;
    const int64_t kv_head = head / plan.group_size();
    const float* center = p.key_frame.center(kv_head);
    const float* at_sink = p.key_frame.sink(kv_head);
    const float* balance = p.key_frame.balance(kv_head);
    Lanes with_center = splat(0.0f);
    for (int g = 0; g < head_dim; g += kGroup) {
      alignas(64) float q[kGroup];
      float* x1 = &q1[row * head_dim + g];
      float* x2 = &q2[row * head_dim + g];
      read_row(p.query, token, head, g, kGroup, q);
      Lanes with_sink = splat(0.0f);
      for (int j = 0; j < kGroup; j += kLanes) {
        const Lanes from = load(center + g + j), to = load(at_sink + g + j);
        with_center = fma(load(q + j), from, with_center);
        with_sink = fma(load(q + j), to - from, with_sink);
      }
      sink[row * p.cache.layout.num_groups() + g / kGroup] = reduce_add(with_sink) * p.scale;
      for (int j = 0; j < kGroup; ++j) x1[j] = q[j] / balance[g + j] * kKeySignTable.sign[j];
      hadamard_row<kGroup>(x1);
      for (int j = 0; j < kGroup; ++j) {
        x1[j] *= p.scale / Book::kRoot;
        x2[j] = x1[j] * kResidualSignTable.sign[j];
      }
      hadamard_row<kGroup>(x2);
      for (int j = 0; j < kGroup; ++j) x2[j] *= Book::kQjlWeight;
    }
    bias[row] = reduce_add(with_center) * p.scale;
  }
};

// Attends rows to tokens: one tile of rows and one split of its tokens at a time.
template <int kGroup>
class TilePass {
 public:
  explicit TilePass(const Queries& queries)
      : queries_(queries),
        plan_(queries.plan),
        cache_(plan_.p.cache),
        head_dim_(cache_.layout.head_dim),
        at_(cache_.layout.offsets(cache_.block_size)),
        copy_at_(cache_.layout.copy_offsets()),
        query_(new Query[kRowTile * cache_.layout.num_groups()]),
        has_spans_(plan_.p.key_frame.num_spans > 0) {
    for (auto& offsets : span_offsets_) {
      offsets.reset(new float[kRowTile * cache_.layout.num_groups()]());
    }
    std::fill(std::begin(near_), std::end(near_), span_offsets_[0].get());
  }

  void run(Partial* partial) {
    partial_ = partial;
    tile_ = &plan_.tiles[partial->tile];
    for (int r = 0; r < tile_->num_rows; ++r) {
      partial->max[r] = kNoScore, partial->sum[r] = 0;
      const int64_t at = plan_.query_row(*tile_, r) * head_dim_;
      for (int g = 0; g < cache_.layout.num_groups(); ++g) {
        query(g, r)->prepare(&queries_.q1[at + g * kGroup], &queries_.q2[at + g * kGroup]);
      }
    }
    std::fill_n(partial->out, tile_->num_rows * head_dim_, 0.0f);
    span_center_ = nullptr;
    const BlockTable& table = plan_.p.block_table;
    const int32_t* blocks = table.data + tile_->req * table.req_stride;
    const auto steps = [&](int rows) { return (tile_->num_rows + rows - 1) / rows; };
    const int num_steps =
        steps(1) + cache_.layout.num_groups() * (2 + steps(CodeTile<kGroup>::kScoreRows) +
                                                 steps(CodeTile<kGroup>::kValueRows));
    const int lines = kTokens * cache_.layout.slot_bytes() / 64 / num_steps + 1;
    ahead_.start(cache_, blocks, tile_->kv_head, partial->begin + kTokens, lines);
    for (int64_t token = partial->begin; token < partial->end; token += kTokens) {
      ahead_.allow(std::min(partial->end, token + 2 * kTokens));
      const int64_t left = partial->end - token, unseen = plan_.first_seen(*tile_, 0) - token;
      num_units_ = static_cast<int>((std::min<int64_t>(kTokens, left) + kLanes - 1) / kLanes);
      for (int u = 0; u < num_units_; ++u) {
        units_[u] = locate(cache_, blocks, tile_->kv_head, token + u * kLanes);
      }
      if (has_spans_) find_spans(token);
      find_copies(blocks, token, unseen, std::min<int64_t>(kTokens, left));
      score();
      score_copies();
      for (int r = 0; r < tile_->num_rows; ++r) {
        ahead_.step();
        weigh(r, plan_.first_seen(*tile_, r) - token,
              std::min(partial->end, plan_.end_seen(*tile_, r)) - token);
      }
      accumulate(unseen, left);
      accumulate_copies();
    }
  }

 private:
  using Query = typename CodeTile<kGroup>::Query;
  static constexpr int kTokens = CodeTile<kGroup>::kTokens;

  Query* query(int g, int row) const { return &query_[g * kRowTile + row]; }

  // Find the offsets of the spans of all units from `token` on.
  void find_spans(int64_t token) {
    for (int u = 0; u < num_units_; ++u) {
      const float* center = plan_.p.key_frame.near(tile_->kv_head, token + u * kLanes);
      if (center != span_center_) enter_span(center);
      near_[u] = span_offsets_[0].get();
    }
  }

  // Compute the offsets of every row and group in the span with this center: what a score has from
  // a key that starts there instead of at the frame's center.
  void enter_span(const float* center) {
    static_assert(kSpanTokens % kUnitTokens == 0 && kTokens <= kSpanTokens,
                  "a unit lies in one span, and a tile of tokens in two at most");
    std::swap(span_offsets_[0], span_offsets_[1]);
    span_center_ = center;
    const AttentionParams& p = plan_.p;
    const float* from = p.key_frame.center(tile_->kv_head);
    for (int r = 0; r < tile_->num_rows; ++r) {
      const int64_t row = plan_.query_row(*tile_, r);
      for (int g = 0; g < cache_.layout.num_groups(); ++g) {
        alignas(64) float q[kGroup];
        read_row(p.query, row / p.num_heads, row % p.num_heads, g * kGroup, kGroup, q);
        Lanes dot = splat(0.0f);
        for (int j = 0; j < kGroup; j += kLanes) {
          const Lanes way = load(center + g * kGroup + j) - load(from + g * kGroup + j);
          dot = fma(load(q + j), way, dot);
        }
        span_offsets_[0][g * kRowTile + r] = reduce_add(dot) * p.scale;
      }
    }
  }

  // Find which of `count` tokens from `token` on, but for `unseen` ones, are read from copies.
  void find_copies(const int32_t* blocks, int64_t token, int64_t unseen, int64_t count) {
    num_copied_ = 0;
    const Copies& copies = plan_.p.copies;
    if (!copies.data) return;
    const int window = first_window_unit(plan_.p.seq_lens[tile_->req], copies.window_units);
    const int64_t first = std::max(unseen, int64_t{window} * kUnitTokens - token);
    for (int64_t i = std::max<int64_t>(0, first); i < count; ++i) {
      const int64_t block = blocks[(token + i) / cache_.block_size];
      const int64_t slot = block * cache_.block_size + (token + i) % cache_.block_size;
      const int32_t mapped = copies.unit_map[slot / kUnitTokens];
      const int offset = static_cast<int>(slot % kUnitTokens);
      if (!(mapped >> offset & 1)) continue;
      copied_[num_copied_++] = {static_cast<int>(i), copies.unit(mapped, tile_->kv_head), offset};
    }
  }

  // 1. Scores of every row and token, from codes.
  void score() {
    for (int g = 0; g < cache_.layout.num_groups(); ++g) {
      ahead_.step();
      codes_.load_keys(units_, num_units_, cache_.layout, at_, g, tile_->num_rows);
      load_all_scales(at_.key_scale, g);
      const bool any_at_sink = take_signs();
      for (int r = 0; r < tile_->num_rows; r += CodeTile<kGroup>::kScoreRows) {
        const int num_rows = std::min(CodeTile<kGroup>::kScoreRows, tile_->num_rows - r);
        ahead_.step();
        codes_.score(query(g, r), num_rows, scale_, g == 0, weights_ + r);
      }
      if (any_at_sink || has_spans_) move_to_origins(g);
    }
  }

  // Make the key scales magnitudes, and keep where their signs were set; return whether any was.
  bool take_signs() {
    Words any = splat(0u);
    for (int u = 0; u < num_units_; ++u) {
      const Words bits = as_words(load(scale_ + u * kLanes));
      at_sink_[u] = bits >> 31;
      any = any | at_sink_[u];
      store(scale_ + u * kLanes, as_lanes(bits & splat(0x7fffffffu)));
    }
    uint32_t flags[kLanes];
    store(flags, any);
    return std::any_of(flags, flags + kLanes, [](uint32_t flag) { return flag != 0; });
  }

  // Add what keys of group `g` have from starting at their origins instead of the frame's center.
  void move_to_origins(int g) {
    for (int r = 0; r < tile_->num_rows; ++r) {
      const int64_t row = plan_.query_row(*tile_, r);
      const Lanes sink = splat(queries_.sink[row * cache_.layout.num_groups() + g]);
      for (int u = 0; u < num_units_; ++u) {
        float* scores = weights_[r] + u * kLanes;
        const Lanes near = splat(near_[u][g * kRowTile + r]);
        store(scores, add_where_bit(load(scores) + near, at_sink_[u], 0, sink - near));
      }
    }
  }

  // Replace the scores of tokens that have copies.
  void score_copies() {
    const int num_groups = cache_.layout.num_groups();
    for (int i = 0; i < num_copied_; ++i) {
      const CopiedToken& token = copied_[i];
      for (int g = 0; g < num_groups; ++g) {
        const int8_t* codes = token.codes<kGroup>(cache_.layout, copy_at_.key, g);
        const float scale = token.scale(copy_at_.key_scale, g);
        alignas(64) float key[kGroup];
        for (int j = 0; j < kGroup; ++j) key[j] = std::fabs(scale) * codes[j];
        for (int r = 0; r < tile_->num_rows; ++r) {
          const int64_t row = plan_.query_row(*tile_, r);
          const float* q1 = &queries_.q1[row * head_dim_ + g * kGroup];
          Lanes dot = splat(0.0f);
          for (int j = 0; j < kGroup; j += kLanes) dot = fma(load(q1 + j), load(key + j), dot);
          const float offset = std::signbit(scale) ? queries_.sink[row * num_groups + g]
                                                   : near_[token.index / kLanes][g * kRowTile + r];
          float& score = weights_[r][token.index];
          score = (g == 0 ? 0 : score) + reduce_add(dot) + offset;
        }
      }
    }
  }

  // 2. Mask, update the running maximum and sum, and turn the scores of row `r`, which sees tokens
  // [first, last) from here on, into weights.
  void weigh(int r, int64_t first, int64_t last) {
    float* row = weights_[r];
    const int64_t count = num_units_ * kLanes;
    first = std::max<int64_t>(0, first), last = std::min(last, count);
    if (first >= last) {
      std::fill_n(row, count, 0.0f);
      return;
    }
    std::fill(row, row + first, kNoScore);
    std::fill(row + last, row + count, kNoScore);
    Lanes max = load(row);
    for (int u = 1; u < num_units_; ++u) {
      const Lanes scores = load(row + u * kLanes);
      max = where(scores > max, scores, max);
    }
    const float before = partial_->max[r], after = std::max(before, reduce_max(max));
    Lanes sum = splat(0.0f);
    for (int u = 0; u < num_units_; ++u) {
      const Lanes weight = exp_nonpositive(load(row + u * kLanes) - splat(after));
      store(row + u * kLanes, weight);
      sum = sum + weight;
    }
    partial_->max[r] = after;
    if (after > before) {
      const float shrink = std::exp(before - after);
      partial_->sum[r] *= shrink;
      float* out = partial_->out + r * head_dim_;
      for (int j = 0; j < head_dim_; ++j) out[j] *= shrink;
    }
    partial_->sum[r] += reduce_add(sum);
  }

  // 3. Add the weighted values of codes; `left` tokens are in the split, and rows see none of the
  // first `unseen`.
  void accumulate(int64_t unseen, int64_t left) {
    float* out[kRowTile];
    for (int g = 0; g < cache_.layout.num_groups(); ++g) {
      ahead_.step();
      codes_.load_values(units_, num_units_, cache_.layout, at_, g);
      load_all_scales(at_.value_scale, g);
      // NOTE: past the end, before what is seen, and where there is a copy, the scale may be NaN,
      // which a weight of 0 would not silence.
      for (int64_t t = 0; t < unseen; ++t) scale_[t] = 0;
      for (int64_t t = left; t < num_units_ * kLanes; ++t) scale_[t] = 0;
      for (int i = 0; i < num_copied_; ++i) scale_[copied_[i].index] = 0;
      for (int r = 0; r < tile_->num_rows; ++r) {
        out[r] = partial_->out + r * head_dim_ + g * kGroup;
        for (int t = 0; t < num_units_ * kLanes; t += kLanes) {
          store(&scaled_[r][t], load(&weights_[r][t]) * load(scale_ + t));
        }
      }
      for (int r = 0; r < tile_->num_rows; r += CodeTile<kGroup>::kValueRows) {
        const int num_rows = std::min(CodeTile<kGroup>::kValueRows, tile_->num_rows - r);
        ahead_.step();
        codes_.add_values(scaled_ + r, num_rows, out + r);
      }
    }
  }

  // Add the weighted values of tokens that have copies.
  void accumulate_copies() {
    for (int i = 0; i < num_copied_; ++i) {
      const CopiedToken& token = copied_[i];
      for (int g = 0; g < cache_.layout.num_groups(); ++g) {
        const int8_t* codes = token.codes<kGroup>(cache_.layout, copy_at_.value, g);
        const float scale = token.scale(copy_at_.value_scale, g);
        alignas(64) float value[kGroup];
        for (int j = 0; j < kGroup; ++j) value[j] = scale * codes[CodeTile<kGroup>::coordinate(j)];
        for (int r = 0; r < tile_->num_rows; ++r) {
          const float weight = weights_[r][token.index];
          float* out = partial_->out + r * head_dim_ + g * kGroup;
          for (int j = 0; j < kGroup; ++j) out[j] += weight * value[j];
        }
      }
    }
  }

  void load_all_scales(int64_t at, int g) {
    for (int u = 0; u < num_units_; ++u) {
      store(scale_ + u * kLanes, load_scales(units_[u], at, g, cache_.block_size));
    }
  }

  const Queries& queries_;
  const Plan& plan_;
  const Cache& cache_;
  const int head_dim_;
  const BlockOffsets at_;
  const CopyOffsets copy_at_;
  std::unique_ptr<Query[]> query_;  // [num_groups, kRowTile]
  const bool has_spans_;
  // [num_groups, kRowTile], scale * <q, span's center - center>: of the newest span and of the one
  // before it; 0 without spans.
  std::unique_ptr<float[]> span_offsets_[2];
  const float* span_center_;             // of the newest span
  const float* near_[kTokens / kLanes];  // offsets of each unit's span
  const Tile* tile_;
  Partial* partial_;
  int num_units_;
  Unit units_[kTokens / kLanes];
  int num_copied_;
  CopiedToken copied_[kTokens];
  Prefetch ahead_;
  CodeTile<kGroup> codes_;
  alignas(64) float scale_[kTokens];
  Words at_sink_[kTokens / kLanes];               // 1 where a key starts at the sink
  alignas(64) float weights_[kRowTile][kTokens];  // scores, then weights
  alignas(64) float scaled_[kRowTile][kTokens];   // weights times value scales
};

// Merge the splits of one tile, rotate the values back, and write output and log-sum-exp.
template <int kGroup>
void finish_tile(const Queries& queries, const Tile& tile) {
  const AttentionParams& p = queries.plan.p;
  const int head_dim = p.cache.layout.head_dim;
  for (int r = 0; r < tile.num_rows; ++r) {
    const int64_t row = queries.plan.query_row(tile, r);
    const int64_t token = row / p.num_heads, head = row % p.num_heads;
    const Partial* splits = queries.plan.partials.data() + tile.first_split;
    float max = kNoScore, sum = 0, merged[kMaxHeadDim] = {}, out[kMaxHeadDim];
    for (int s = 0; s < tile.num_splits; ++s) max = std::max(max, splits[s].max[r]);
    for (int s = 0; s < tile.num_splits; ++s) {
      if (splits[s].sum[r] == 0) continue;
      const float weight = std::exp(splits[s].max[r] - max);
      sum += weight * splits[s].sum[r];
      for (int j = 0; j < head_dim; ++j) merged[j] += weight * splits[s].out[r * head_dim + j];
    }
    p.lse[head * p.lse_stride + token] =
        sum == 0 ? kNoScore : max + std::log(sum) + queries.bias[row];
    const float scale = sum == 0 ? 0 : 1 / (sum * Codebook<kGroup>::kRoot);
    for (int g = 0; g < head_dim; g += kGroup) {
      for (int j = 0; j < kGroup; ++j) out[g + CodeTile<kGroup>::coordinate(j)] = merged[g + j];
      hadamard_row<kGroup>(out + g);
      for (int j = 0; j < kGroup; ++j) out[g + j] *= scale * kValueSignTable.sign[j];
    }
    write_row(p.out, token, head, 0, head_dim, out);
  }
}

template <int kGroup>
void attend(const AttentionParams& p, const Threads& threads) {
  Plan plan(p, threads.count);
  Queries queries(plan);
  const int64_t first_token = p.query_start_loc[0], last_token = p.query_start_loc[p.num_reqs];
  threads.run((last_token - first_token) * p.num_heads, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      queries.rotate<kGroup>(first_token + i / p.num_heads, static_cast<int>(i % p.num_heads));
    }
  });
  threads.run(static_cast<int64_t>(plan.partials.size()), 1, [&](int64_t begin, int64_t end) {
    const auto pass = std::make_unique<TilePass<kGroup>>(queries);
    for (int64_t s = begin; s < end; ++s) pass->run(&plan.partials[s]);
  });
  threads.run(static_cast<int64_t>(plan.tiles.size()), kRowGrain / 8,
              [&](int64_t begin, int64_t end) {
                for (int64_t t = begin; t < end; ++t) finish_tile<kGroup>(queries, plan.tiles[t]);
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
