// Conversion of a GPTQ file's words to the layout of native.h, some outputs at a time. A file isa_*.cpp includes it.
#include "native.h"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace belle {
namespace {

// The codes of input k for `count` outputs from n on, one per lane.
inline void load_codes(const PackedWordsStruct& w, int64_t k, int64_t n, int64_t count, uint32_t* codes) {
  const int64_t bit = k * w.bits, row = bit / 32;
  const int shift = static_cast<int>(bit % 32);
  const uint32_t mask = (1u << w.bits) - 1;
  const int32_t* words = w.words + row * w.outputs + n;
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint32_t>(words[i]) >> shift & mask;
  if (shift + w.bits > 32) {  // a code of 3 bits that begins in one word and ends in the next
    const int32_t* next = words + w.outputs;
    for (int64_t i = 0; i < count; ++i) codes[i] |= static_cast<uint32_t>(next[i]) << (32 - shift) & mask;
  }
}

// Gather, code by code, the bytes that hold the inputs from `position` on for `count` outputs from n on.
inline void gather_codes(const PackedWordsStruct& w, int64_t position, int64_t n, int64_t count, uint32_t* packed) {
  for (int j = 0; j < 8 / w.container; ++j) {
    for (int i = 0; i < 4; ++i, ++position) {
      const int64_t input = w.order != nullptr ? w.order[position] : position < w.inputs ? position : -1;
      if (input < 0) continue;
      uint32_t codes[kPackedOutputs] = {};
      load_codes(w, input, n, count, codes);
      const int shift = 8 * i + w.container * j;
      for (int64_t lane = 0; lane < kPackedOutputs; ++lane) packed[lane] |= codes[lane] << shift;
    }
  }
}

// Move the fields 4 j + i of 2 bits of a word to 4 i + j.
inline uint32_t transpose_2_bits(uint32_t x) {
  uint32_t swap = (x ^ x >> 6) & 0x00CC00CCu;
  x ^= swap ^ swap << 6;
  swap = (x ^ x >> 12) & 0x0000F0F0u;
  return x ^ swap ^ swap << 12;
}

// Move the fields 4 j + i of 4 bits of a word to 2 i + j: fields of the two halves alternate.
inline uint32_t transpose_4_bits(uint32_t x) {
  uint32_t low = x & 0xFFFFu, high = x >> 16;
  low = (low | low << 8) & 0x00FF00FFu;
  high = (high | high << 8) & 0x00FF00FFu;
  return ((low | low << 4) & 0x0F0F0F0Fu) | ((high | high << 4) & 0x0F0F0F0Fu) << 4;
}

// `gather_codes` for inputs in their original order and codes of unchanged width: a word of the file becomes a word of
// the layout by moving its fields. Every row of words is on another page, to which processors do not prefetch.
inline void move_words(const PackedWordsStruct& w, int64_t position, int64_t n, int64_t count, uint32_t* packed) {
  constexpr int64_t kAhead = 4;  // rows; 2 and 8 are as fast
  if (position >= w.inputs) return;
  const int32_t* words = w.words + position * w.bits / 32 * w.outputs + n;
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(words + kAhead * w.outputs + i);
  switch (w.bits) {
    case 2:
      for (int64_t i = 0; i < count; ++i) packed[i] = transpose_2_bits(static_cast<uint32_t>(words[i]));
      break;
    case 4:
      for (int64_t i = 0; i < count; ++i) packed[i] = transpose_4_bits(static_cast<uint32_t>(words[i]));
      break;
    default:
      std::memcpy(packed, words, 4 * count);
  }
}

// Write 64 bytes to an aligned address without reading it into the cache first.
inline void write_line(uint8_t* to, const uint32_t* from) {
#if defined(__SSE2__)
  for (int i = 0; i < 4; ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i));
  }
#else
  std::memcpy(to, from, 64);
#endif
}

void pack_strip(const PackedWordsStruct& w, int64_t strip, uint8_t* out) {
  const int vectors = w.run * w.container / 32, inputs = 32 / w.container;
  const int64_t n = strip * kPackedOutputs, padded = (w.outputs + kPair - 1) / kPair * kPair;
  const int64_t count = w.outputs - n < kPackedOutputs ? w.outputs - n : kPackedOutputs;
  const int64_t lanes = padded - n < kPackedOutputs ? padded - n : kPackedOutputs;
  const auto fill = w.order == nullptr && w.bits == w.container ? move_words : gather_codes;
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int v = 0; v < vectors; ++v) {
      uint32_t packed[kPackedOutputs] = {};
      fill(w, g * w.run + inputs * v, n, count, packed);
      for (int64_t lane = 0; lane < lanes; lane += kBlock) {
        const int64_t block = (n + lane) / kBlock;
        write_line(out + ((block * w.groups + g) * vectors + v) * 64, packed + lane);
      }
    }
  }
#if defined(__SSE2__)
  _mm_sfence();  // makes the writes visible to other threads
#endif
}

}  // namespace
}  // namespace belle
