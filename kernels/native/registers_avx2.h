// Registers of 256 bits, as AVX2 and AVX-VNNI use them.
#include <immintrin.h>

#include <cstdint>

namespace belle {
namespace {

struct Registers256 {
  static constexpr int kLanes = 8;    // outputs per register
  static constexpr int kColumns = 2;  // registers of outputs per tile
  static constexpr int kTileRows = 4;
  static constexpr int kStreamBlocks = 1;
  static constexpr int kStreamRows = 4;
  static constexpr int kStreamPasses = 1;

  using Int = __m256i;
  using Float = __m256;

  static inline Int set(int32_t v) { return _mm256_set1_epi32(v); }
  static inline Float set_float(float v) { return _mm256_set1_ps(v); }
  static inline Int load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Int*>(p)); }
  static inline void store(uint8_t* p, Int v) { _mm256_storeu_si256(reinterpret_cast<Int*>(p), v); }
  static inline Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store_float(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static inline Float load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Float load_char(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static inline float sum(Float v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static inline Int load_short(const int16_t* p) {
    return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <int SHIFT, uint32_t MASK>
  static inline Int field(Int v) {
    if constexpr (SHIFT > 0) v = _mm256_srli_epi16(v, SHIFT);
    if constexpr (MASK != 0xFFFFFFFFu) v = _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int32_t>(MASK)));
    return v;
  }
  static inline Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static inline Int subtract(Int a, Int b) { return _mm256_sub_epi32(a, b); }
  static inline Int multiply(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  template <int BY>
  static inline Int shift_left(Int a) { return _mm256_slli_epi32(a, BY); }
  static inline Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }
  static inline Float times(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static inline Float fused(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace belle
