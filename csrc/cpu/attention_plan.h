// How a batch of paged attention is cut into work: tiles of query rows and splits of the tokens.
//
// A row is one query head of one query token; the rows of a KV head share every decoded code.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "core/params.h"
#include "cpu/simd.h"

namespace tq::cpu {

constexpr int kRowTile = 32;    // query rows that share a pass over the tokens
constexpr int kMinSplit = 256;  // tokens that pay for a partial result
constexpr int kRowGrain = 128;  // rows to rotate or merge that pay for another thread
constexpr float kNoScore = -std::numeric_limits<float>::infinity();

// Rows of one KV head of one request, and where their partial results are.
struct Tile {
  int req, kv_head, first_row, num_rows;
  int64_t begin, end;  // tokens that any row sees; begin is rounded down to a multiple of sixteen
  int first_split, num_splits;
  int64_t split_tokens;
};

// Partial result of rows over some tokens: running maximum, sum and unnormalized output.
struct Partial {
  int tile;
  int64_t begin, end;                  // tokens, begin a multiple of sixteen
  float max[kRowTile], sum[kRowTile];  // sum 0: nothing seen
  float* out;                          // [num_rows, head_dim], in the rotated space of values
};

struct Plan {
  const AttentionParams& p;
  std::vector<Tile> tiles;
  std::vector<Partial> partials;
  std::unique_ptr<float[]> out;

  Plan(const AttentionParams& params, int num_threads) : p(params) {
    constexpr int kSharedCost = 2;  // decoding, in rows
    const auto cost = [](const Tile& tile) {
      return static_cast<double>(tile.end - tile.begin) * (kSharedCost + tile.num_rows);
    };
    double total = 0;
    for (int req = 0; req < p.num_reqs; ++req) {
      const int rows = (p.query_start_loc[req + 1] - p.query_start_loc[req]) * group_size();
      for (int head = 0; head < p.cache.num_kv_heads; ++head) {
        for (int first = 0; first < rows; first += kRowTile) {
          Tile tile{req, head, first, std::min(kRowTile, rows - first), 0, 0, 0, 0, 0};
          tile.end = end_seen(tile, tile.num_rows - 1);
          const int64_t begin = first_seen(tile, 0);
          tile.begin = begin < tile.end ? begin / kLanes * kLanes : tile.end;
          total += cost(tile);
          tiles.push_back(tile);
        }
      }
    }
    const double cost_each = total / (4 * num_threads);
    int64_t num_rows = 0;
    for (size_t t = 0; t < tiles.size(); ++t) {
      Tile& tile = tiles[t];
      tile.first_split = static_cast<int>(partials.size());
      const int64_t num_tokens = tile.end - tile.begin;
      if (num_tokens == 0) continue;
      const int64_t most = (num_tokens + kMinSplit - 1) / kMinSplit;
      const int64_t splits =
          std::clamp<int64_t>(static_cast<int64_t>(cost(tile) / cost_each + 0.5), 1, most);
      tile.split_tokens = ((num_tokens + splits - 1) / splits + kLanes - 1) / kLanes * kLanes;
      for (int64_t begin = tile.begin; begin < tile.end; begin += tile.split_tokens) {
        Partial partial{};
        partial.tile = static_cast<int>(t);
        partial.begin = begin;
        partial.end = std::min(tile.end, begin + tile.split_tokens);
        partials.push_back(partial);
        num_rows += tile.num_rows;
      }
      tile.num_splits = static_cast<int>(partials.size()) - tile.first_split;
    }
    const int head_dim = p.cache.layout.head_dim;
    out.reset(new float[num_rows * head_dim]);
    float* next = out.get();
    for (Partial& partial : partials) {
      partial.out = next;
      next += tiles[partial.tile].num_rows * head_dim;
    }
  }

  int group_size() const { return p.num_heads / p.cache.num_kv_heads; }
  // Index of a row's (token, head).
  int64_t query_row(const Tile& tile, int row) const {
    const int r = tile.first_row + row, size = group_size();
    return int64_t{p.query_start_loc[tile.req] + r / size} * p.num_heads +
           int64_t{tile.kv_head} * size + r % size;
  }
  // First token that a row sees, and one past the last.
  int64_t first_seen(const Tile& tile, int row) const {
    return p.first_seen(p.seq_lens[tile.req], query_len(tile), query_token(tile, row));
  }
  int64_t end_seen(const Tile& tile, int row) const {
    const int seq_len = p.seq_lens[tile.req];
    const int below = p.sees_below(seq_len, query_len(tile), query_token(tile, row));
    return std::clamp(below, 0, seq_len);
  }

 private:
  int query_len(const Tile& tile) const {
    return p.query_start_loc[tile.req + 1] - p.query_start_loc[tile.req];
  }
  int query_token(const Tile& tile, int row) const { return (tile.first_row + row) / group_size(); }
};

}  // namespace tq::cpu
