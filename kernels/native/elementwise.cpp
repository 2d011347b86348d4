// Norms and activation functions, row by row.
#include "native.h"

#include <cmath>

namespace belle {
namespace {

constexpr int64_t kMinValues = 1 << 13;  // per piece of work
constexpr int kSums = 16;

// The sum of f(i) for i in 0 .. count, in 16 partial sums: SSE is enough, a few thousand values take a microsecond.
template <class F>
inline float sum_of(int64_t count, const F& f) {
  float sums[kSums] = {}, sum = 0.0f;
  const int64_t whole = count / kSums * kSums;
  for (int64_t i = 0; i < whole; i += kSums) {
    for (int lane = 0; lane < kSums; ++lane) sums[lane] += f(i + lane);
  }
  for (float part : sums) sum += part;
  for (int64_t i = whole; i < count; ++i) sum += f(i);
  return sum;
}

// x / sqrt(mean(x^2) + eps) * weight
void rms_norm(const float* x, const float* weight, float* out, int64_t width, float eps) {
  const float mean = sum_of(width, [=](int64_t i) { return x[i] * x[i]; }) / static_cast<float>(width);
  const float factor = 1.0f / std::sqrt(mean + eps);
  for (int64_t i = 0; i < width; ++i) out[i] = x[i] * factor * weight[i];
}

// (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias
void layer_norm(const float* x, const float* weight, const float* bias, float* out, int64_t width, float eps) {
  const float count = static_cast<float>(width), mean = sum_of(width, [=](int64_t i) { return x[i]; }) / count;
  const float variance = sum_of(width, [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); }) / count;
  const float factor = 1.0f / std::sqrt(variance + eps);
  for (int64_t i = 0; i < width; ++i) out[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

void compute_row(const CallStruct& call, const IsaKernels& kernels, int64_t row) {
  const int64_t width = call.width;
  const float* x = call.x + row * width;
  const float* weight = static_cast<const float*>(call.operand);
  switch (call.kind) {
    case kRmsNorm: return rms_norm(x, weight, call.out + row * width, width, call.eps);
    case kLayerNorm: return layer_norm(x, weight, call.addend, call.out + row * width, width, call.eps);
    case kSiluAndMul: return kernels.silu_and_mul(x, x + width / 2, call.out + row * width / 2, width / 2);
    default: return kernels.gelu(x, call.out + row * width, width);
  }
}

}  // namespace

// The caller has checked the shapes; only for GELU, `out` may be `x`.
int run_elementwise(const CallStruct& call, int threads, int isa) {
  const IsaKernels& kernels = *kernels_for(isa);
  if (call.rows * call.width < kSingleThreadValues) threads = 1;
  const int64_t unit = call.width < kMinValues ? kMinValues / call.width : 1;
  parallel_for(threads, call.rows, unit, [&](int64_t row, int64_t end, int) {
    for (; row < end; ++row) compute_row(call, kernels, row);
  });
  return 0;
}

}  // namespace belle
