// What stands between the two products of a feed-forward layer. A file isa_*.cpp includes it for its compiler flags.
#include "exponential.h"

#include <cmath>

namespace belle {
namespace {

// x / (1 + e^-y). The exponent is never positive: nothing overflows on the way. Where e^-|y| is no number of float's full
// precision any more, it is 0.
inline float gated(float x, float y) {
  const float e = std::fabs(y) > 87.0f ? 0.0f : exponential(-std::fabs(y));
  return x * (y < 0.0f ? e : 1.0f) / (1.0f + e);
}

void silu_and_mul(const float* __restrict gate, const float* __restrict up, float* __restrict out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = gated(gate[i], gate[i]) * up[i];
}

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as x / (1 + e^-y) with twice the argument. `out` may be `x`.
void gelu(const float* x, float* out, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) out[i] = gated(x[i], 1.5957691216f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
}

}  // namespace
}  // namespace belle
