// Which units of 16 tokens have 8-bit copies: reference_recent.py (assign), in the same order.
//
// Once a step for all layers, request by request.
#include <algorithm>

#include "cpu/kernels.h"

namespace tq::cpu {
namespace {

constexpr int32_t kEveryToken = (1 << kUnitTokens) - 1;

// Units of one request, counted from its first token.
struct Request {
  const AssignParams& p;
  const int32_t* blocks;
  int seq_len, begin;  // tokens from `begin` on are written in this step
  int num_units, window, first_written;

  Request(const AssignParams& p_, int req)
      : p(p_),
        blocks(p.block_table.data + req * p.block_table.req_stride),
        seq_len(p.seq_lens[req]),
        begin(std::max(0, seq_len - (p.query_start_loc[req + 1] - p.query_start_loc[req]))),
        num_units((seq_len + kUnitTokens - 1) / kUnitTokens),
        window(first_window_unit(seq_len, p.window_units)),
        first_written(begin / kUnitTokens) {}

  // Entry of unit i in the map of the cache's units.
  int64_t unit(int i) const {
    return int64_t{blocks[i / p.units_per_block]} * p.units_per_block + i % p.units_per_block;
  }
  // Valid bits of unit i that this step leaves as they are, and those that it sets.
  int32_t kept(int i) const { return bits(begin - i * kUnitTokens); }
  int32_t written(int i) const { return bits(seq_len - i * kUnitTokens) & ~kept(i); }

 private:
  static int32_t bits(int count) { return (1 << std::clamp(count, 0, kUnitTokens)) - 1; }
};

int place_of(int32_t mapped) { return (mapped >> 16) - 1; }

// Hands out the places that no window of this step needs, each at most once.
class FreePlaces {
 public:
  explicit FreePlaces(const AssignParams& p) : p_(p), next_(p.clock[0]), left_(p.num_places) {}

  // Give a unit the next free place, if there is one.
  void give_to(int64_t unit) {
    for (; left_ > 0; --left_) {
      const int place = next_;
      next_ = (next_ + 1) % p_.num_places;
      int32_t& owner = p_.places[place][0];
      int32_t& last_step = p_.places[place][1];
      if (last_step == p_.step) continue;
      if (owner >= 0 && place_of(p_.unit_map[owner]) == place) p_.unit_map[owner] = 0;
      owner = static_cast<int32_t>(unit), last_step = p_.step;
      p_.unit_map[unit] = (place + 1) << 16;
      p_.clock[0] = next_;
      --left_;
      return;
    }
  }

 private:
  const AssignParams& p_;
  int next_, left_;
};

}  // namespace

void assign_recent(const AssignParams& p) {
  // 1. Places that windows need.
  for (int req = 0; req < p.num_reqs; ++req) {
    const Request request(p, req);
    for (int i = request.window; i < request.num_units; ++i) {
      const int32_t mapped = p.unit_map[request.unit(i)];
      if (mapped != 0) p.places[place_of(mapped)][1] = p.step;
    }
  }
  // 2. What is written behind a window gets no copies.
  for (int req = 0; req < p.num_reqs; ++req) {
    const Request request(p, req);
    for (int i = request.first_written; i < request.window; ++i) {
      p.unit_map[request.unit(i)] &= ~kEveryToken | request.kept(i);
    }
  }
  // 3. What is written in a window gets copies where there is a place.
  FreePlaces free(p);
  for (int req = 0; req < p.num_reqs; ++req) {
    const Request request(p, req);
    for (int i = std::max(request.first_written, request.window); i < request.num_units; ++i) {
      int32_t& mapped = p.unit_map[request.unit(i)];
      if (mapped == 0) free.give_to(request.unit(i));
      if (mapped != 0) mapped = (mapped & (~kEveryToken | request.kept(i))) | request.written(i);
    }
  }
  // 4. What windows have.
  int num_in_windows = 0, num_placed = 0;
  for (int req = 0; req < p.num_reqs; ++req) {
    const Request request(p, req);
    for (int i = request.window; i < request.num_units; ++i) {
      ++num_in_windows;
      num_placed += p.unit_map[request.unit(i)] != 0;
    }
  }
  p.clock[1] = num_in_windows, p.clock[2] = num_placed;
}

}  // namespace tq::cpu
