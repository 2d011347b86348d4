// Any processor: plain loops over 16 lanes, which compilers turn into the vectors of the processor.
#include "float16.h"

namespace belle {
namespace {

struct Isa {
  static constexpr int kLanes = 16;        // outputs per register
  static constexpr int kInputs = 2;        // inputs per lane and dot product: words of 16 bits
  static constexpr int kColumns = 1;       // registers of outputs per tile
  static constexpr int kTileRows = 2;      // rows per tile
  static constexpr int kStreamBlocks = 1;  // blocks per stream
  static constexpr int kStreamRows = 4;    // rows per stream, at most
  static constexpr int kStreamPasses = 1;  // streams of the same codes, at most

  struct Int { int32_t lane[kLanes]; };
  struct Float { float lane[kLanes]; };

  template <class To, class F>
  static inline To each_lane(F f) {
    To result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = f(i);
    return result;
  }

  static inline Int set(int32_t v) { return each_lane<Int>([=](int) { return v; }); }
  static inline Float set_float(float v) { return each_lane<Float>([=](int) { return v; }); }
  static inline Int load(const uint8_t* p) { Int v; std::memcpy(&v, p, sizeof v); return v; }
  static inline void store(uint8_t* p, Int v) { std::memcpy(p, &v, sizeof v); }
  static inline Float load_float(const float* p) { Float v; std::memcpy(&v, p, sizeof v); return v; }
  static inline void store_float(float* p, Float v) { std::memcpy(p, &v, sizeof v); }
  static inline Float load_char(const int8_t* p) {
    return each_lane<Float>([=](int i) { return static_cast<float>(p[i]); });
  }
  static inline float sum(const Float& v) {
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += v.lane[i];
    return total;
  }
  static inline Int load_short(const int16_t* p) { return each_lane<Int>([=](int i) { return p[i]; }); }
  static inline Float load_half(const uint16_t* p) {
    return each_lane<Float>([=](int i) { return half_to_float(p[i]); });
  }

  template <int SHIFT, uint32_t MASK>
  static inline Int field(const Int& v) {
    return each_lane<Int>(
        [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(v.lane[i]) >> SHIFT & MASK); });
  }

  static inline Int dot(const Int& sum, const Int& code, int32_t x) {
    const int32_t first = static_cast<int16_t>(x), second = x >> 16;
    return each_lane<Int>([&](int i) {
      return sum.lane[i] + (code.lane[i] & 0xFFFF) * first + (code.lane[i] >> 16) * second;
    });
  }

  static inline Int add(const Int& a, const Int& b) {
    return each_lane<Int>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static inline Int subtract(const Int& a, const Int& b) {
    return each_lane<Int>([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static inline Int multiply(const Int& a, const Int& b) {
    return each_lane<Int>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  template <int BY>
  static inline Int shift_left(const Int& a) { return each_lane<Int>([&](int i) { return a.lane[i] * (1 << BY); }); }
  static inline Float to_float(const Int& a) {
    return each_lane<Float>([&](int i) { return static_cast<float>(a.lane[i]); });
  }
  static inline Float times(const Float& a, const Float& b) {
    return each_lane<Float>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  // Rounded twice: std::fma is a slow function if the processor has no such instruction.
  static inline Float fused(const Float& a, const Float& b, const Float& c) {
    return each_lane<Float>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
};

}  // namespace
}  // namespace belle

#include "kernel_table.h"

const belle::IsaKernels belle::kPortable = belle::kKernels;
