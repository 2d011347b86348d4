// The layout of native.h, made from the words of a GPTQ file.
#include "native.h"

#include <atomic>
#include <cstring>

namespace belle {
namespace {

constexpr int64_t kStrip = 4 * kBlock;  // outputs packed together: whole cache lines of the words' rows

struct PackTask {
  BelleWords w;
  uint8_t* out;
  std::atomic<int64_t> next{0};
};

// The codes of input k of `count` outputs from n on, one a lane.
inline void load_codes(const BelleWords& w, int64_t k, int64_t n, int64_t count, uint32_t* codes) {
  const int64_t bit = k * w.bits, row = bit / 32;
  const int shift = static_cast<int>(bit % 32);
  const uint32_t mask = (1u << w.bits) - 1;
  const int32_t* words = w.words + row * w.outputs + n;
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint32_t>(words[i]) >> shift & mask;
  if (shift + w.bits > 32) {  // a code of 3 bits that begins in one word and ends in the next
    const int32_t* behind = words + w.outputs;
    for (int64_t i = 0; i < count; ++i) codes[i] |= static_cast<uint32_t>(behind[i]) << (32 - shift) & mask;
  }
}

void pack_strip(const BelleWords& w, int64_t strip, uint8_t* out) {
  const int per_byte = 8 / w.container, vectors = w.run * w.container / 32;
  const int64_t n = strip * kStrip, padded = (w.outputs + kPair - 1) / kPair * kPair;
  const int64_t count = w.outputs - n < kStrip ? w.outputs - n : kStrip;
  const int64_t lanes = padded - n < kStrip ? padded - n : kStrip;
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int v = 0; v < vectors; ++v) {
      uint32_t packed[kStrip] = {};
      for (int j = 0; j < per_byte; ++j) {
        for (int i = 0; i < 4; ++i) {
          const int64_t place = g * w.run + 4 * (per_byte * v + j) + i;
          const int64_t input = w.order != nullptr ? w.order[place] : place < w.inputs ? place : -1;
          if (input < 0) continue;
          uint32_t codes[kStrip] = {};
          load_codes(w, input, n, count, codes);
          const int shift = 8 * i + w.container * j;
          for (int64_t lane = 0; lane < kStrip; ++lane) packed[lane] |= codes[lane] << shift;
        }
      }
      for (int64_t lane = 0; lane < lanes; lane += kBlock) {
        const int64_t block = (n + lane) / kBlock;
        std::memcpy(out + ((block * w.groups + g) * vectors + v) * 64, packed + lane, 64);
      }
    }
  }
}

void pack_strips(void* context) {
  PackTask& task = *static_cast<PackTask*>(context);
  const int64_t strips = (task.w.outputs + kStrip - 1) / kStrip;
  for (int64_t strip; (strip = task.next++) < strips;) pack_strip(task.w, strip, task.out);
}

}  // namespace
}  // namespace belle

// Fill `out` (padded N / 16, G, run * container / 32, 64); the caller has checked shapes and `order`.
BELLE_API void belle_pack(const BelleWords* words, uint8_t* out, int threads) {
  belle::PackTask task{*words, out, {}};
  belle::parallel(threads, belle::pack_strips, &task);
}
