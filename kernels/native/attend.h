// Attention of one new token: its queries meet the keys and values of its own sequence, up to its own length. A file
// isa_*.cpp includes it behind tile.h. What a token gets depends on its own row alone, not on its batch or on threads:
// one thread computes a head of a row from beginning to end. (Instruction sets differ in the last bits: a product's
// terms are added by register.)
#include "native.h"

#include <cmath>
#include <cstring>

namespace belle {
namespace {

constexpr int kKeys = 64;  // keys whose numbers stay in the first-level cache while all queries that share them come by

inline float half_to_float(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFF) << 13;
  float value;
  std::memcpy(&value, &magnitude, 4);
  value *= 5.192296858534828e33f;  // 2^112: the difference of the exponents' offsets
  return bits & 0x8000 ? -value : value;
}

template <int KIND>
inline typename Isa::Float load_number(const void* table, int64_t at) {
  if constexpr (KIND == 0) {
    return Isa::load_float(static_cast<const float*>(table) + at);
  } else if constexpr (KIND == 1) {
    return Isa::load_half(static_cast<const uint16_t*>(table) + at);
  } else {
    return Isa::load_char(static_cast<const int8_t*>(table) + at);
  }
}

// e to the power of x <= 0, relative error 2e-7; plain arithmetic, so that the loop around it becomes vectors.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number, which its bits hold
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

template <int KIND>
inline float product(const float* query, const void* keys, int64_t at, int64_t size) {
  typename Isa::Float sum = Isa::set_float(0.0f);
  for (int64_t i = 0; i < size; i += Isa::kLanes) {
    sum = Isa::fused(load_number<KIND>(keys, at + i), Isa::load_float(query + i), sum);
  }
  return Isa::sum(sum);
}

// Probabilities of scores[0 .. count), in place; returns one over their sum, by which the caller divides at the end.
inline float softmax(float* scores, int64_t count) {
  float most = scores[0];
  for (int64_t t = 1; t < count; ++t) most = scores[t] > most ? scores[t] : most;
  float sum = 0.0f;
  for (int64_t t = 0; t < count; ++t) scores[t] = exponential(scores[t] - most);
  for (int64_t t = 0; t < count; ++t) sum += scores[t];
  return 1.0f / sum;
}

// out[0 .. size) += weights[t] * value[t] for the values of `count` keys from element `at` on.
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
        for (int j = 0; j < kSums; ++j) sum[j] = Isa::fused(load_number<KIND>(values, from + j * Isa::kLanes), weight, sum[j]);
      } else {
        for (int j = 0; j < sums; ++j) sum[j] = Isa::fused(load_number<KIND>(values, from + j * Isa::kLanes), weight, sum[j]);
      }
    }
    for (int j = 0; j < sums; ++j) Isa::store_float(out + i + j * Isa::kLanes, sum[j]);
  }
}

template <int KIND>
void attend_kind(const BelleAttention& a, int64_t row, int64_t head, float* scratch) {
  const int64_t size = a.head_dim, group = a.heads / a.kv_heads, count = a.lengths[row];
  const int64_t first = (static_cast<int64_t>(a.slots[row]) * a.kv_heads + head) * a.capacity;  // of its positions
  float* queries = scratch;                  // (group, size)
  float* scores = scratch + group * size;    // (group, count)
  float* out = a.out + (row * a.heads + head * group) * size;
  for (int64_t q = 0; q < group; ++q) {
    const float* from = a.query + row * a.query_row + (head * group + q) * a.query_head;
    for (int64_t i = 0; i < size; ++i) queries[q * size + i] = from[i] * a.scale;
  }
  for (int64_t begin = 0; begin < count; begin += kKeys) {
    const int64_t end = begin + kKeys < count ? begin + kKeys : count;
    for (int64_t q = 0; q < group; ++q) {
      const float slope = a.slopes == nullptr ? 0.0f : a.slopes[head * group + q];
      for (int64_t t = begin; t < end; ++t) {
        float score = product<KIND>(queries + q * size, a.keys, (first + t) * size, size);
        if constexpr (KIND == 2) score *= half_to_float(a.key_scales[first + t]);
        scores[q * count + t] = score + slope * static_cast<float>(t - (count - 1));
      }
    }
  }
  for (int64_t q = 0; q < group; ++q) {
    const float inverse = softmax(scores + q * count, count);
    for (int64_t t = 0; t < count; ++t) {
      scores[q * count + t] *= inverse;
      if constexpr (KIND == 2) scores[q * count + t] *= half_to_float(a.value_scales[first + t]);
    }
  }
  std::memset(out, 0, static_cast<size_t>(group * size) * sizeof(float));
  for (int64_t begin = 0; begin < count; begin += kKeys) {
    const int64_t keys = begin + kKeys < count ? kKeys : count - begin;
    for (int64_t q = 0; q < group; ++q) {
      add_values<KIND>(out + q * size, scores + q * count + begin, a.values, (first + begin) * size, keys, size);
    }
  }
}

void attend(const BelleAttention& a, int64_t row, int64_t head, float* scratch) {
  switch (a.kind) {
    case 0: return attend_kind<0>(a, row, head, scratch);
    case 1: return attend_kind<1>(a, row, head, scratch);
    default: return attend_kind<2>(a, row, head, scratch);
  }
}

}  // namespace
}  // namespace belle
