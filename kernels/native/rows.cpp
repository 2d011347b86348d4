// The layout of native.h, made from the rows of a matrix such as an embedding.
#include "native.h"

#include <atomic>
#include <cstring>

namespace belle {
namespace {

struct RowsTask {
  BelleRows r;
  uint8_t* out;
  std::atomic<int64_t> next{0};
};

// Numbers / scale, to the nearest whole number, the even one of two, in -128 .. 127; 128 is added.
inline void round_run(const float* values, float scale, int run, uint8_t* codes) {
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to whole numbers
  const float divisor = scale == 0.0f ? 1.0f : scale;
  for (int i = 0; i < run; ++i) {
    float q = values[i] / divisor;
    q = q < -128.0f ? -128.0f : q;
    q = q > 127.0f ? 127.0f : q;
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>((q + kWhole) - kWhole) + 128);
  }
}

void lay_block(const BelleRows& r, int64_t block, uint8_t* out) {
  const int fields = 8 / r.bits, vectors = r.run * r.bits / 32;
  uint8_t rounded[kMostRun];
  out += block * r.groups * vectors * 64;
  for (int64_t g = 0; g < r.groups; ++g, out += vectors * 64) {
    for (int lane = 0; lane < kBlock; ++lane) {
      const int64_t row = block * kBlock + lane, at = (row * r.groups + g) * r.run;
      const uint8_t* codes = static_cast<const uint8_t*>(r.matrix) + at;
      if (r.scales != nullptr) {
        round_run(static_cast<const float*>(r.matrix) + at, r.scales[row * r.groups + g], r.run, rounded);
        codes = rounded;
      }
      for (int v = 0; v < vectors; ++v, codes += 4 * fields) {
        uint32_t word = 0, four;
        for (int field = 0; field < fields; ++field) {
          std::memcpy(&four, codes + 4 * field, 4);
          word |= four << r.bits * field;
        }
        std::memcpy(out + v * 64 + 4 * lane, &word, 4);
      }
    }
  }
}

void lay_blocks(void* context) {
  RowsTask& task = *static_cast<RowsTask*>(context);
  for (int64_t block; (block = task.next++) < task.r.count / kBlock;) lay_block(task.r, block, task.out);
}

}  // namespace
}  // namespace belle

// Fill `out` (N / 16, G, run * bits / 32, 64); the caller has checked shapes, and that all numbers are finite.
BELLE_API void belle_pack_rows(const BelleRows* rows, uint8_t* out, int threads) {
  belle::RowsTask task{*rows, out, {}};
  belle::parallel(threads, belle::lay_blocks, &task);
}
