// RMS normalisation of rows. One pass of SSE over a few thousand numbers takes a microsecond; what it saves is calls: after
// a product has read megabytes, every operation of torch comes from memory anew, and there it is six of them.
#include "native.h"

#include <atomic>
#include <cmath>

namespace {

constexpr int64_t kAtATime = 8;         // rows
constexpr int64_t kInlineNumbers = 1 << 16;  // below, waking threads takes longer than the work

struct Norm {
  const float* x;       // (M, H)
  const float* weight;  // (H)
  float* out;           // (M, H)
  int64_t rows, width;
  float eps;
  std::atomic<int64_t> next{0};
};

void norm_row(const Norm& n, int64_t row) {
  constexpr int kSums = 16;
  const float* x = n.x + row * n.width;
  float* out = n.out + row * n.width;
  float sums[kSums] = {}, sum = 0.0f;
  const int64_t whole = n.width / kSums * kSums;
  for (int64_t i = 0; i < whole; i += kSums) {
    for (int lane = 0; lane < kSums; ++lane) sums[lane] += x[i + lane] * x[i + lane];
  }
  for (float part : sums) sum += part;
  for (int64_t i = whole; i < n.width; ++i) sum += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(n.width) + n.eps);
  for (int64_t i = 0; i < n.width; ++i) out[i] = x[i] * factor * n.weight[i];
}

void norm_rows(void* context) {
  Norm& n = *static_cast<Norm*>(context);
  for (int64_t row; (row = kAtATime * n.next++) < n.rows;) {
    const int64_t end = row + kAtATime < n.rows ? row + kAtATime : n.rows;
    for (; row < end; ++row) norm_row(n, row);
  }
}

}  // namespace

// out = x / sqrt(mean(x^2) + eps) * weight, row by row. The caller has checked shapes; `out` is not `x`.
BELLE_API void belle_rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float eps,
                              int threads) {
  Norm norm{x, weight, out, rows, width, eps, {}};
  belle::parallel(rows * width < kInlineNumbers ? 1 : threads, norm_rows, &norm);
}
