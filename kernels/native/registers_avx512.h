// Registers of 512 bits, as AVX-512BW and later instruction sets use them.
#include <immintrin.h>

#include <cstdint>

namespace belle {
namespace {

struct Registers512 {
  static constexpr int kLanes = 16;   // outputs per register
  static constexpr int kColumns = 2;  // registers of outputs per tile
  static constexpr int kTileRows = 8;
  static constexpr int kStreamBlocks = 2;

  using Int = __m512i;
  using Float = __m512;

  static inline Int set(int32_t v) { return _mm512_set1_epi32(v); }
  static inline Float set_float(float v) { return _mm512_set1_ps(v); }
  static inline Int load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static inline void store(uint8_t* p, Int v) { _mm512_storeu_si512(p, v); }
  static inline Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store_float(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static inline Float load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static inline Float load_char(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static inline float sum(Float v) { return _mm512_reduce_add_ps(v); }
  static inline Int load_short(const int16_t* p) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <int SHIFT, uint32_t MASK>
  static inline Int field(Int v) {
    if constexpr (SHIFT > 0) v = _mm512_srli_epi16(v, SHIFT);
    if constexpr (MASK != 0xFFFFFFFFu) v = _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int32_t>(MASK)));
    return v;
  }
  static inline Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static inline Int subtract(Int a, Int b) { return _mm512_sub_epi32(a, b); }
  static inline Int multiply(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  template <int BY>
  static inline Int shift_left(Int a) { return _mm512_slli_epi32(a, BY); }
  static inline Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
  static inline Float times(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static inline Float fused(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace belle
