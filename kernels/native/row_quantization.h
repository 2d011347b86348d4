// Rounding of a matrix's rows to symmetric codes, with one scale per run of inputs. A file isa_*.cpp includes it after
// matmul.h. Every operation is rounded separately, so that instruction sets agree to the bit.
#include "float16.h"
#include "native.h"

#include <cstring>

namespace belle {
namespace {

inline void load_run(const RowQuantizationStruct& r, int64_t at, float* values) {
  if (r.kind == 0) {
    std::memcpy(values, static_cast<const float*>(r.matrix) + at, r.run * sizeof(float));
  } else if (r.kind == 1) {
    const uint16_t* from = static_cast<const uint16_t*>(r.matrix) + at;
    for (int i = 0; i < r.run; i += Isa::kLanes) Isa::store_float(values + i, Isa::load_half(from + i));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(r.matrix) + at;
    for (int i = 0; i < r.run; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(values + i, &bits, 4);
    }
  }
}

// Round a run to codes minus their zero point, with the scale for the magnitude `largest`, which is returned.
inline uint16_t quantize_run(const float* __restrict values, float largest, int run, float top,
                             float* __restrict codes) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
  float wanted = largest / top;
  wanted = wanted < 6e-8f ? 6e-8f : wanted;
  wanted = wanted > 65504.0f ? 65504.0f : wanted;
  const uint16_t scale = float_to_half(wanted);
  const float divisor = half_to_float(scale);
  for (int i = 0; i < run; ++i) {
    float q = values[i] / divisor;
    q = q < -top - 1.0f ? -top - 1.0f : q;
    q = q > top ? top : q;
    codes[i] = (q + kRound) - kRound;
  }
  return scale;
}

// The sum of squared errors of a run.
inline float squared_error(const float* __restrict values, const float* __restrict codes, uint16_t scale, int run) {
  constexpr int kSums = 16;
  const float factor = half_to_float(scale);
  float sums[kSums] = {};
  for (int i = 0; i < run; i += kSums) {
    for (int lane = 0; lane < kSums; ++lane) {
      const float off = codes[i + lane] * factor - values[i + lane];
      sums[lane] += off * off;
    }
  }
  float sum = 0.0f;
  for (float part : sums) sum += part;
  return sum;
}

inline void store_codes(uint8_t* __restrict to, const float* __restrict codes, int run, float zero) {
  for (int i = 0; i < run; ++i) to[i] = static_cast<uint8_t>(static_cast<int32_t>(codes[i] + zero));
}

// Quantize one row; returns false if it holds NaN or infinity.
bool quantize_row(const RowQuantizationStruct& r, int64_t row) {
  const int64_t groups = r.inputs / r.run;
  const float top = static_cast<float>((1 << (r.bits - 1)) - 1);
  float values[kMaxRun], found[2][kMaxRun];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = row * r.inputs + g * r.run;
    load_run(r, at, values);
    const int32_t bits = max_magnitude_bits(values, r.run);
    // Infinity and NaN of float16 may have become 65536 and more.
    if (bits >= (r.kind == 1 ? 0x47800000 : 0x7F800000)) return false;
    float largest;
    std::memcpy(&largest, &bits, 4);
    float* best = found[0];
    uint16_t scale = quantize_run(values, largest, r.run, top, best);
    float least = r.clip_count > 0 ? squared_error(values, best, scale, r.run) : 0.0f;
    for (int64_t c = 0; c < r.clip_count; ++c) {
      float* other = best == found[0] ? found[1] : found[0];
      const uint16_t other_scale = quantize_run(values, largest * r.clips[c], r.run, top, other);
      const float error = squared_error(values, other, other_scale, r.run);
      if (error < least) least = error, best = other, scale = other_scale;
    }
    r.scales[row * groups + g] = scale;
    store_codes(r.codes + at, best, r.run, top + 1.0f);
  }
  return true;
}

}  // namespace
}  // namespace belle
