// Conversion of float16, stored as bits, on any processor.
#pragma once

#include <cstdint>
#include <cstring>

namespace belle {
namespace {

// Exact, including subnormal numbers, infinity and NaN.
inline float half_to_float(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFF) << 13;
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  float value;
  std::memcpy(&value, &magnitude, 4);
  value *= 5.192296858534828e33f;  // 2^112: the difference of the exponent biases
  uint32_t result;
  std::memcpy(&result, &value, 4);
  result = magnitude < 0x0F800000u ? result : magnitude | 0x7F800000u;
  result |= sign;
  std::memcpy(&value, &result, 4);
  return value;
}

// Rounds to the nearest float16, halves to even.
inline uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 65536 and more, infinity, NaN
    half = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // float16's smallest step is that of a float just below 1
    float small;
    std::memcpy(&small, &magnitude, 4);
    small += 0.5f;
    std::memcpy(&half, &small, 4);
    half -= 0x3F000000u;
  } else {
    half = (magnitude + 0xFFFu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  }
  return static_cast<uint16_t>(half | sign);
}

}  // namespace
}  // namespace belle
