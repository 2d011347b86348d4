// Attention of one new token to the keys and values of its sequence. A file isa_*.cpp includes it after matmul.h. The
// result for a token depends on its own row alone, not on its batch or on threads: one thread computes a head of a row
// from beginning to end. (Instruction sets differ in the last bits: the terms of a dot product are added by register.)
#include "exponential.h"
#include "float16.h"
#include "native.h"

#include <cmath>
#include <cstring>

namespace belle {
namespace {

constexpr int kKeyTile = 64;  // keys that stay in the first-level cache while all queries that share them are processed

template <int KIND>
inline typename Isa::Float load_value(const void* table, int64_t at) {
  if constexpr (KIND == 0) {
    return Isa::load_float(static_cast<const float*>(table) + at);
  } else if constexpr (KIND == 1) {
    return Isa::load_half(static_cast<const uint16_t*>(table) + at);
  } else {
    return Isa::load_char(static_cast<const int8_t*>(table) + at);
  }
}

// One head of a new token times a factor, with rotary position embeddings if there are any: its halves are rotated
// against each other (arXiv 2104.09864, section 3.4.2).
inline void rotate(const AttentionStruct& a, const NewTokensStruct& from, int64_t row, int64_t head, float factor,
                   float* out) {
  const DecodeStepStruct& s = *a.step;
  const int64_t size = a.cache->head_dim, half = size / 2;
  const float* x = from.values + row * from.row_stride + head * from.head_stride;
  if (s.cosines == nullptr) {
    for (int64_t i = 0; i < size; ++i) out[i] = x[i] * factor;
    return;
  }
  const float* cosines = s.cosines + row * size;
  const float* sines = s.sines + row * size;
  for (int64_t i = 0; i < half; ++i) {
    out[i] = (x[i] * cosines[i] + x[i + half] * sines[i]) * factor;
    out[i + half] = (x[i + half] * cosines[i + half] + x[i] * sines[i + half]) * factor;
  }
}

// Store one head at a position of a table, with its scale for int8.
template <int KIND>
inline void store_head(const float* x, int64_t size, void* table, int64_t position, uint16_t* scales) {
  if constexpr (KIND == 0) {
    std::memcpy(static_cast<float*>(table) + position * size, x, static_cast<size_t>(size) * sizeof(float));
  } else if constexpr (KIND == 1) {
    uint16_t* to = static_cast<uint16_t*>(table) + position * size;
    for (int64_t i = 0; i < size; ++i) to[i] = float_to_half(x[i]);
  } else {
    constexpr float kMaxCode = 127.0f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
    const int32_t bits = max_magnitude_bits(x, static_cast<int>(size));
    float largest;
    std::memcpy(&largest, &bits, 4);
    largest /= kMaxCode;
    scales[position] = float_to_half(largest < 6e-8f ? 6e-8f : largest);
    const float scale = half_to_float(scales[position]);
    int8_t* to = static_cast<int8_t*>(table) + position * size;
    for (int64_t i = 0; i < size; ++i) {
      float code = x[i] / scale;
      code = code > -kMaxCode ? (code < kMaxCode ? code : kMaxCode) : -kMaxCode;  // the scale represents NaN
      to[i] = static_cast<int8_t>((code + kRound) - kRound);
    }
  }
}

template <int KIND>
inline float dot(const float* query, const void* keys, int64_t at, int64_t size) {
  typename Isa::Float sum = Isa::set_float(0.0f);
  for (int64_t i = 0; i < size; i += Isa::kLanes) {
    sum = Isa::fused(load_value<KIND>(keys, at + i), Isa::load_float(query + i), sum);
  }
  return Isa::sum(sum);
}

// Replace scores[0 .. count) by e^(score - largest score), and return 1 / (their sum), which makes them probabilities.
inline float exponentiate(float* scores, int64_t count) {
  float largest = scores[0];
  for (int64_t t = 1; t < count; ++t) largest = scores[t] > largest ? scores[t] : largest;
  float sum = 0.0f;
  for (int64_t t = 0; t < count; ++t) scores[t] = exponential(scores[t] - largest);
  for (int64_t t = 0; t < count; ++t) sum += scores[t];
  return 1.0f / sum;
}

// out[0 .. size) += weights[t] * value[t] for `count` values, the first at element `at`.
template <int KIND>
inline void add_values(float* out, const float* weights, const void* values, int64_t at, int64_t count, int64_t size) {
  constexpr int kSums = 4;
  for (int64_t i = 0; i < size; i += kSums * Isa::kLanes) {
    const int64_t left = (size - i) / Isa::kLanes;
    const int sums = left < kSums ? static_cast<int>(left) : kSums;
    typename Isa::Float sum[kSums];
    for (int j = 0; j < sums; ++j) sum[j] = Isa::load_float(out + i + j * Isa::kLanes);
    for (int64_t t = 0; t < count; ++t) {
      const typename Isa::Float weight = Isa::set_float(weights[t]);
      const int64_t from = at + t * size + i;
      if (sums == kSums) {
#pragma GCC unroll 4
        for (int j = 0; j < kSums; ++j)
          sum[j] = Isa::fused(load_value<KIND>(values, from + j * Isa::kLanes), weight, sum[j]);
      } else {
        for (int j = 0; j < sums; ++j)
          sum[j] = Isa::fused(load_value<KIND>(values, from + j * Isa::kLanes), weight, sum[j]);
      }
    }
    for (int j = 0; j < sums; ++j) Isa::store_float(out + i + j * Isa::kLanes, sum[j]);
  }
}

template <int KIND>
void attend_kind(const AttentionStruct& a, int64_t row, int64_t head, float* scratch) {
  const KvCacheStruct& c = *a.cache;
  const int64_t size = c.head_dim, group = a.heads / c.kv_heads, last = a.step->lengths[row], count = last + 1;
  const int64_t first = (a.step->slots[row] * c.kv_heads + head) * c.capacity;  // position in the tables
  const float factor = 1.0f / std::sqrt(static_cast<float>(size));
  float* queries = scratch;                // (group, size)
  float* scores = scratch + group * size;  // (group, count)
  float* key = scores + group * count;     // (size)
  float* out = a.out + (row * a.heads + head * group) * size;
  rotate(a, a.key, row, head, 1.0f, key);
  store_head<KIND>(key, size, c.keys, first + last, c.key_scales);
  const float* value = a.value.values + row * a.value.row_stride + head * a.value.head_stride;
  store_head<KIND>(value, size, c.values, first + last, c.value_scales);
  for (int64_t q = 0; q < group; ++q) rotate(a, a.query, row, head * group + q, factor, queries + q * size);
  for (int64_t begin = 0; begin < count; begin += kKeyTile) {
    const int64_t end = begin + kKeyTile < count ? begin + kKeyTile : count;
    for (int64_t q = 0; q < group; ++q) {
      const float slope = a.step->slopes == nullptr ? 0.0f : a.step->slopes[head * group + q];
      for (int64_t t = begin; t < end; ++t) {
        float score = dot<KIND>(queries + q * size, c.keys, (first + t) * size, size);
        if constexpr (KIND == 2) score *= half_to_float(c.key_scales[first + t]);
        scores[q * count + t] = score + slope * static_cast<float>(t - last);
      }
    }
  }
  for (int64_t q = 0; q < group; ++q) {
    const float inverse = exponentiate(scores + q * count, count);
    for (int64_t t = 0; t < count; ++t) {
      scores[q * count + t] *= inverse;
      if constexpr (KIND == 2) scores[q * count + t] *= half_to_float(c.value_scales[first + t]);
    }
  }
  std::memset(out, 0, static_cast<size_t>(group * size) * sizeof(float));
  for (int64_t begin = 0; begin < count; begin += kKeyTile) {
    const int64_t keys = begin + kKeyTile < count ? kKeyTile : count - begin;
    for (int64_t q = 0; q < group; ++q) {
      add_values<KIND>(out + q * size, scores + q * count + begin, c.values, (first + begin) * size, keys, size);
    }
  }
}

void attend_head(const AttentionStruct& a, int64_t row, int64_t head, float* scratch) {
  switch (a.cache->kind) {
    case 0: return attend_kind<0>(a, row, head, scratch);
    case 1: return attend_kind<1>(a, row, head, scratch);
    default: return attend_kind<2>(a, row, head, scratch);
  }
}

}  // namespace
}  // namespace belle
