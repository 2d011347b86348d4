// The activation functions of feed-forward layers. A file isa_*.cpp includes it, to compile it with its own flags.
#include "exponential.h"

#include <cmath>

namespace belle {
namespace {

// x times sigmoid(y) = x / (1 + e^-y). The exponent is never positive, so that nothing overflows; a subnormal e^-|y| is
// replaced by 0.
inline float times_sigmoid(float x, float y) {
  const float e = std::fabs(y) > 87.0f ? 0.0f : exponential(-std::fabs(y));
  return x * (y < 0.0f ? e : 1.0f) / (1.0f + e);
}

void silu_and_mul(const float* __restrict gate, const float* __restrict up, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = times_sigmoid(gate[i], gate[i]) * up[i];
}

// x / 2 (1 + tanh(y)) = x times sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3). `out` may be `x`.
void gelu(const float* x, float* out, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i)
    out[i] = times_sigmoid(x[i], 1.5957691216f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
}

}  // namespace
}  // namespace belle
