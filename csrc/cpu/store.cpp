// Store: rotate, quantize, sketch and scatter keys and values.
//
// Sixteen vectors are coded at once, one per lane, so that every step is the scalar algorithm of
// reference.py (encode_keys, encode_values) with the same order of float32 operations: the bytes
// are equal. Compute-bound: about 3 transforms of group * log2(group) additions per key.
//
// Recent tokens are also kept in 8 bits, with the bytes of reference_recent.py (store_copies).
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/rotation.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace tq::cpu {
namespace {

constexpr float kHalfMax = 65504.0f;
constexpr uint16_t kHalfSignBit = 0x8000;

// Codes of one group of sixteen vectors.
struct GroupCode {
  Words index[kMaxGroup / 16];  // 16 indices a word
  Words sign[kMaxGroup / 32];   // 32 signs a word
  uint16_t scale[kLanes];       // float16
};

// 8-bit copies of one group of sixteen vectors.
struct GroupCopy {
  Words code[kMaxGroup / 4];  // 4 codes a word
  uint16_t scale[kLanes];     // float16
};

// Sum x[kSize] by halving, in place.
template <int kSize>
Lanes tree_sum(Lanes* x) {
  for (int half = kSize / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) x[j] = x[j] + x[j + half];
  }
  return x[0];
}

template <int kGroup>
void rotate(const SignDiagonal& signs, const Lanes* x, Lanes* out) {
  for (int j = 0; j < kGroup; ++j) out[j] = splat(signs[j]) * x[j];
  hadamard<kGroup>(out);
}

Lanes sqrt(const Lanes& x) {
  float value[kLanes];
  store(value, x);
  for (float& v : value) v = std::sqrt(v);
  return load(value);
}

template <int kGroup>
Lanes sum_of_squares(const Lanes* x) {
  Lanes squares[kGroup];
  for (int j = 0; j < kGroup; ++j) squares[j] = x[j] * x[j];
  return tree_sum<kGroup>(squares);
}

// Rotate and normalize x[kGroup] of length `norm`; write u, its indices and its centroids.
template <int kGroup>
void quantize(const SignDiagonal& signs, const Lanes* x, const Lanes& norm, Lanes* u,
              Lanes* centroids, Words* index) {
  using Book = Codebook<kGroup>;
  const Lanes inverse = where(norm > splat(0.0f), splat(1.0f) / norm, splat(0.0f));
  rotate<kGroup>(signs, x, u);
  for (int w = 0; w < kGroup / 16; ++w) index[w] = splat(0u);
  for (int j = 0; j < kGroup; ++j) {
    u[j] = u[j] * inverse;
    const Words code = ((u[j] > splat(-Book::kBoundary)) & splat(1u)) +
                       ((u[j] > splat(0.0f)) & splat(1u)) +
                       ((u[j] > splat(Book::kBoundary)) & splat(1u));
    centroids[j] = centroid<kGroup>(code);
    index[j / 16] = index[j / 16] | (code << (2 * (j % 16)));
  }
}

// |x| sqrt(d) / <u, u^>, saturated, as float16; 0 for a zero vector.
template <int kGroup>
void finish_scale(const Lanes& norm, const Lanes& overlap, uint16_t* scale) {
  float value[kLanes];
  store(value, where(norm > splat(0.0f), norm * splat(Codebook<kGroup>::kRoot) / overlap, norm));
  for (int i = 0; i < kLanes; ++i) {
    scale[i] = half_from_float(value[i] > kHalfMax ? kHalfMax : value[i]);
  }
}

// Encode x, a key from the center of its span, or, where that is shorter, `far`, the same key from
// the sink.
template <int kGroup>
void encode_key(Lanes* x, const Lanes* far, GroupCode* code) {
  Lanes u[kGroup], centroids[kGroup], projected[kGroup], scratch[kGroup];
  const Lanes square = sum_of_squares<kGroup>(x), far_square = sum_of_squares<kGroup>(far);
  const Words at_sink = square > far_square;
  for (int j = 0; j < kGroup; ++j) x[j] = where(at_sink, far[j], x[j]);
  const Lanes norm = sqrt(where(at_sink, far_square, square));
  quantize<kGroup>(kKeySigns, x, norm, u, centroids, code->index);
  for (int j = 0; j < kGroup; ++j) scratch[j] = u[j] - centroids[j];
  rotate<kGroup>(kResidualSigns, scratch, projected);
  for (int w = 0; w < kGroup / 32; ++w) code->sign[w] = splat(0u);
  rotate<kGroup>(kResidualSigns, u, scratch);
  for (int j = 0; j < kGroup; ++j) {
    const Words positive = projected[j] >= splat(0.0f);
    code->sign[j / 32] = code->sign[j / 32] | ((positive & splat(1u)) << (j % 32));
    scratch[j] = where(positive, scratch[j], splat(-0.0f) - scratch[j]);
  }
  const Lanes agreement = tree_sum<kGroup>(scratch);
  for (int j = 0; j < kGroup; ++j) centroids[j] = u[j] * centroids[j];
  const Lanes overlap =
      tree_sum<kGroup>(centroids) + splat(Codebook<kGroup>::kQjlWeight) * agreement;
  finish_scale<kGroup>(norm, overlap, code->scale);
  uint32_t sink[kLanes];
  tq::store(sink, at_sink);
  for (int i = 0; i < kLanes; ++i) {  // also of 0 and NaN
    const uint32_t magnitude = code->scale[i] & ~uint32_t{kHalfSignBit};
    code->scale[i] = static_cast<uint16_t>(magnitude | (sink[i] & kHalfSignBit));
  }
}

template <int kGroup>
void encode_value(const Lanes* x, GroupCode* code) {
  Lanes u[kGroup], centroids[kGroup];
  const Lanes norm = sqrt(sum_of_squares<kGroup>(x));
  quantize<kGroup>(kValueSigns, x, norm, u, centroids, code->index);
  for (int j = 0; j < kGroup; ++j) centroids[j] = u[j] * centroids[j];
  finish_scale<kGroup>(norm, tree_sum<kGroup>(centroids), code->scale);
}

// Rotate x[kGroup] and round it to 8 bits.
template <int kGroup>
void encode_copy(const SignDiagonal& signs, const Lanes* x, GroupCopy* copy) {
  constexpr float kLargest = 127.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: rounds a sum to an integer, in its low bits
  Lanes y[kGroup];
  rotate<kGroup>(signs, x, y);
  Words magnitude = splat(0u);  // as bit patterns, NaN is the largest
  for (int j = 0; j < kGroup; ++j) {
    magnitude = max(magnitude, as_words(y[j]) & splat(0x7fffffffu));
  }
  const Lanes largest = as_lanes(magnitude), zero = splat(0.0f);
  const Lanes inverse = where(zero >= largest, zero, splat(kLargest) / largest);
  for (int w = 0; w < kGroup / 4; ++w) copy->code[w] = splat(0u);
  for (int j = 0; j < kGroup; ++j) {
    Lanes code = y[j] * inverse;
    code = where(code >= code, code, zero);  // not NaN
    code = where(code > splat(kLargest), splat(kLargest), code);
    code = where(splat(-kLargest) > code, splat(-kLargest), code);
    const Words byte = as_words(code + splat(kRound)) & splat(0xffu);
    copy->code[j / 4] = copy->code[j / 4] | (byte << (8 * (j % 4)));
  }
  float scale[kLanes];
  tq::store(scale, largest / splat(kLargest * Codebook<kGroup>::kRoot));
  for (int i = 0; i < kLanes; ++i) copy->scale[i] = half_from_float(scale[i]);
}

// Where a vector is stored: in a region of arrays, at the index of its token.
struct Target {
  uint8_t* region;  // null: nowhere
  int64_t offset;
};

// One vector of a batch.
struct Vector {
  int64_t token;
  int64_t kv_head;
  Target slot;
  Target copy;
};

// Read group `g` of up to sixteen vectors into lanes x[kGroup]; lanes without a vector are 0. Map
// changes a vector's row: map(vector, row).
template <int kGroup, typename Map>
void gather(const Rows& rows, const Vector* vectors, int count, int g, const Map& map, Lanes* x) {
  alignas(64) float transposed[kGroup][kLanes] = {};
  float row[kGroup];
  for (int i = 0; i < count; ++i) {
    read_row(rows, vectors[i].token, vectors[i].kv_head, g * kGroup, kGroup, row);
    map(vectors[i], row);
    for (int j = 0; j < kGroup; ++j) transposed[j][i] = row[j];
  }
  for (int j = 0; j < kGroup; ++j) x[j] = load(transposed[j]);
}

// Group `g` of keys as seen from the center of their span, or from the sink.
template <int kGroup>
void gather_keys(const StoreParams& p, const Vector* vectors, int count, int g, bool from_sink,
                 Lanes* x) {
  const auto map = [&](const Vector& vector, float* row) {
    const KeyFrame& frame = p.key_frame;
    const float* origin = from_sink ? frame.sink(vector.kv_head)
                                    : frame.near(vector.kv_head, p.position(vector.token));
    const float* balance = frame.balance(vector.kv_head) + g * kGroup;
    origin += g * kGroup;
    for (int j = 0; j < kGroup; ++j) row[j] = (row[j] - origin[j]) * balance[j];
  };
  gather<kGroup>(p.key, vectors, count, g, map, x);
}

// Write a word of every lane at `at` bytes behind the start of its region, tokens `stride_bytes`
// apart.
void scatter(const Words& words, const Vector* vectors, int count, Target Vector::* target_of,
             int64_t at, int stride_bytes) {
  uint32_t value[kLanes];
  tq::store(value, words);
  for (int i = 0; i < count; ++i) {
    const Target target = vectors[i].*target_of;
    if (target.region) std::memcpy(target.region + at + target.offset * stride_bytes, &value[i], 4);
  }
}

void scatter_scale(const uint16_t* scale, const Vector* vectors, int count,
                   Target Vector::* target_of, int64_t at) {
  for (int i = 0; i < count; ++i) {
    const Target target = vectors[i].*target_of;
    if (target.region) {
      std::memcpy(target.region + at + target.offset * kScaleBytes, &scale[i], kScaleBytes);
    }
  }
}

// Write group `g` of copies, of which `codes` and `scales` are the arrays.
template <int kGroup>
void scatter_copies(const GroupCopy& copy, const Vector* vectors, int count, int g, int head_dim,
                    int64_t codes, int64_t scales) {
  for (int w = 0; w < kGroup / 4; ++w) {
    scatter(copy.code[w], vectors, count, &Vector::copy, codes + g * kGroup + w * 4, head_dim);
  }
  scatter_scale(copy.scale, vectors, count, &Vector::copy, scales + g * kUnitTokens * kScaleBytes);
}

template <int kGroup>
void store_batch(const StoreParams& p, const Vector* vectors, int count) {
  const SlotLayout layout = p.cache.layout;
  const BlockOffsets at = layout.offsets(p.cache.block_size);
  const CopyOffsets copy_at = layout.copy_offsets();
  const bool any_copy =
      std::any_of(vectors, vectors + count, [](const Vector& v) { return v.copy.region; });
  Lanes x[kGroup], far[kGroup];
  GroupCode code;
  GroupCopy copy;
  for (int g = 0; g < layout.num_groups(); ++g) {
    const int64_t scale_row = int64_t{g} * p.cache.block_size * kScaleBytes;
    gather_keys<kGroup>(p, vectors, count, g, false, x);
    gather_keys<kGroup>(p, vectors, count, g, true, far);
    encode_key<kGroup>(x, far, &code);
    for (int w = 0; w < kGroup / 16; ++w) {
      scatter(code.index[w], vectors, count, &Vector::slot,
              at.key_index + (g * kGroup / 16 + w) * 4, layout.index_bytes());
    }
    for (int w = 0; w < kGroup / 32; ++w) {
      scatter(code.sign[w], vectors, count, &Vector::slot, at.key_sign + (g * kGroup / 32 + w) * 4,
              layout.sign_bytes());
    }
    scatter_scale(code.scale, vectors, count, &Vector::slot, at.key_scale + scale_row);
    if (any_copy) {
      encode_copy<kGroup>(kKeySigns, x, &copy);
      for (int i = 0; i < kLanes; ++i) copy.scale[i] |= code.scale[i] & kHalfSignBit;
      scatter_copies<kGroup>(copy, vectors, count, g, layout.head_dim, copy_at.key,
                             copy_at.key_scale);
    }
    gather<kGroup>(p.value, vectors, count, g, [](const Vector&, float*) {}, x);
    encode_value<kGroup>(x, &code);
    for (int w = 0; w < kGroup / 16; ++w) {
      scatter(code.index[w], vectors, count, &Vector::slot,
              at.value_index + (g * kGroup / 16 + w) * 4, layout.index_bytes());
    }
    scatter_scale(code.scale, vectors, count, &Vector::slot, at.value_scale + scale_row);
    if (any_copy) {
      encode_copy<kGroup>(kValueSigns, x, &copy);
      scatter_copies<kGroup>(copy, vectors, count, g, layout.head_dim, copy_at.value,
                             copy_at.value_scale);
    }
  }
}

// Vector of a KV head of a token.
Vector locate(const StoreParams& p, int64_t token, int64_t kv_head) {
  const int64_t slot = p.slot_mapping[token];
  Vector vector{};
  vector.token = token, vector.kv_head = kv_head;
  vector.slot = {p.cache.region(slot / p.cache.block_size, kv_head), slot % p.cache.block_size};
  const int32_t mapped = p.copies.data ? p.copies.unit_map[slot / kUnitTokens] : 0;
  if (mapped != 0) vector.copy = {p.copies.unit(mapped, kv_head), slot % kUnitTokens};
  return vector;
}

}  // namespace

void store(const StoreParams& p, const Threads& threads) {
  std::vector<int64_t> tokens;
  tokens.reserve(p.num_tokens);
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    if (p.slot_mapping[t] >= 0) tokens.push_back(t);
  }
  const int64_t num_heads = p.cache.num_kv_heads;
  const int64_t num_vectors = static_cast<int64_t>(tokens.size()) * num_heads;
  const int64_t num_batches = (num_vectors + kLanes - 1) / kLanes;
  threads.run(num_batches, 2, [&](int64_t begin, int64_t end) {
    Vector vectors[kLanes];
    for (int64_t batch = begin; batch < end; ++batch) {
      const int count = static_cast<int>(std::min<int64_t>(kLanes, num_vectors - batch * kLanes));
      for (int i = 0; i < count; ++i) {
        const int64_t v = batch * kLanes + i;
        vectors[i] = locate(p, tokens[v / num_heads], v % num_heads);
      }
      if (p.cache.layout.group() == 64) {
        store_batch<64>(p, vectors, count);
      } else {
        store_batch<128>(p, vectors, count);
      }
    }
  });
}

}  // namespace tq::cpu
