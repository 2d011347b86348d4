// The matrix product for any instruction set. A file isa_*.cpp defines `struct Isa` and includes this file; everything
// is in an anonymous namespace, so that the linker never takes one instruction set's code for another's.
//
// There are two loops with the same arithmetic. For few rows of x, codes are unpacked while read from memory ("stream":
// each thread should read long contiguous pieces), in up to Isa::kStreamPasses passes of Isa::kStreamRows rows, of which
// the later ones find the codes of a pair of blocks in the second-level cache. For more rows, each group's codes are
// unpacked once, into the first-level cache, and multiplied by all rows ("block").
#include "native.h"

#include <cstring>

namespace belle {
namespace {

constexpr int kVectors = kBlock / Isa::kLanes;  // registers per block

inline int32_t load32(const uint8_t* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <int I>
struct Constant {
  static constexpr int value = I;
};

// f(Constant<0>), f(Constant<1>), ... f(Constant<COUNT - 1>): a loop over compile-time constants.
template <int COUNT, int I = 0, class F>
inline __attribute__((always_inline)) void unrolled_for(F&& f) {
  if constexpr (I < COUNT) {
    f(Constant<I>{});
    unrolled_for<COUNT, I + 1>(f);
  }
}

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- activations ----

struct GroupSplit {
  float scale;
  int32_t sum;  // of the integers
};

// The bits of the largest magnitude: compared as integers, NaN and infinity are larger than all numbers.
inline int32_t max_magnitude_bits(const float* values, int run) {
  int32_t largest = 0;
  for (int i = 0; i < run; ++i) {
    int32_t bits;
    std::memcpy(&bits, values + i, 4);
    bits &= 0x7FFFFFFF;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Split one group of one row. Adding 1.5 * 2^23 rounds to the nearest integer, which is in the low bits of the sum. NaN
// or infinity makes the whole row NaN.
template <int PARTS>
inline GroupSplit split_group(const float* v, int run, uint8_t* high_out, uint8_t* low_out) {
  constexpr float kRound = 12582912.0f;
  constexpr int32_t kRoundBits = 0x4B400000, kInfinity = 0x7F800000, kTiny = 0x0C000000;  // 2^-103: 127 / x is finite
  const int32_t largest_bits = max_magnitude_bits(v, run);
  float largest, inverse = 0.0f, scale = 0.0f;
  std::memcpy(&largest, &largest_bits, 4);
  if (largest_bits >= kInfinity) {
    scale = __builtin_nanf("");
  } else if (largest_bits >= kTiny) {
    inverse = 127.0f / largest;
    scale = largest / 127.0f;
  }
  int32_t combined[kMaxRun], sum = 0;
  for (int i = 0; i < run; ++i) {
    const float t = (largest_bits >= kInfinity ? 0.0f : v[i]) * inverse, shifted = t + kRound;
    int32_t high, low = 0;
    std::memcpy(&high, &shifted, 4);
    high -= kRoundBits;
    if (PARTS == 2) {
      const float rest = (t - (shifted - kRound)) * 256.0f + kRound;
      std::memcpy(&low, &rest, 4);
      low -= kRoundBits;
      low = low > 127 ? 127 : low;
      high = high * 256 + low;
    }
    combined[i] = high;
    sum += high;
  }
  if (Isa::kInputs == 4) {
    for (int i = 0; i < run; ++i) {
      const int8_t low = static_cast<int8_t>(combined[i]);
      if (PARTS == 2) low_out[i] = static_cast<uint8_t>(low);
      high_out[i] = static_cast<uint8_t>(PARTS == 2 ? (combined[i] - low) >> 8 : low);
    }
  } else {
    // Pairs of 16 bits are multiplied by the codes of bytes 0 and 2, then 1 and 3, of every four.
    int16_t* words = reinterpret_cast<int16_t*>(high_out);
    for (int i = 0; i < run; i += 4) {
      words[i] = static_cast<int16_t>(combined[i]);
      words[i + 1] = static_cast<int16_t>(combined[i + 2]);
      words[i + 2] = static_cast<int16_t>(combined[i + 1]);
      words[i + 3] = static_cast<int16_t>(combined[i + 3]);
    }
  }
  return {PARTS == 2 ? scale / 256.0f : scale, sum};
}

void split(const MatmulTask& t, int64_t row_begin, int64_t row_end) {
  const int run = t.w.run;
  for (int64_t m = row_begin; m < row_end; ++m) {
    const float* row = t.x + m * t.w.inputs;
    const int64_t first_position = row_position(t, m);
    for (int64_t g = 0; g < t.w.groups; ++g) {
      float gathered[kMaxRun];
      const float* v = gathered;
      const int64_t first = g * run;
      if (t.w.order != nullptr) {
        for (int i = 0; i < run; ++i) {
          const int32_t input = t.w.order[first + i];
          gathered[i] = input < 0 ? 0.0f : row[input];
        }
      } else if (first + run <= t.w.inputs) {
        v = row + first;
      } else {
        for (int i = 0; i < run; ++i) gathered[i] = first + i < t.w.inputs ? row[first + i] : 0.0f;
      }
      const int64_t position = first_position + g * t.unit_rows;
      const int64_t offset = position * run * (4 / Isa::kInputs);
      const GroupSplit s = t.parts == 2 ? split_group<2>(v, run, t.split[0] + offset, t.split[1] + offset)
                                        : split_group<1>(v, run, t.split[0] + offset, nullptr);
      t.scale[position] = s.scale;
      t.sum[position] = s.sum;
    }
  }
}

// ---- codes ----

// Codes of slice S of a packed register, for one step of `dot`: kInputs neighbours (or every second of four) per lane.
template <int BITS, int S>
inline typename Isa::Int slice(typename Isa::Int packed) {
  if constexpr (Isa::kInputs == 4) {
    return Isa::template field<BITS * S, 0x01010101u * ((1u << BITS) - 1)>(packed);
  } else {
    return Isa::template field<BITS * (S / 2) + 8 * (S % 2), 0x00010001u * ((1u << BITS) - 1)>(packed);
  }
}

template <int BITS>
constexpr int kSlices = 32 / BITS / Isa::kInputs;

// Scales and zero points of one block and group.
struct Grid {
  typename Isa::Float scale[kVectors];
  typename Isa::Int zero[kVectors];
};

inline Grid load_grid(const WeightStruct& w, int64_t block, int64_t group) {
  Grid grid;
  const int64_t first = (block * w.groups + group) * kBlock;
  for (int h = 0; h < kVectors; ++h) {
    const int64_t at = first + h * Isa::kLanes;
    grid.scale[h] = w.half_scales ? Isa::load_half(static_cast<const uint16_t*>(w.scales) + at)
                                  : Isa::load_float(static_cast<const float*>(w.scales) + at);
    grid.zero[h] = w.zeros != nullptr ? Isa::load_short(w.zeros + at) : Isa::set(w.zero);
  }
  return grid;
}

// Minus the zero points times the sum of a row's integers: what a group's products lack, because codes are unsigned. One
// zero point for all outputs is multiplied as a scalar.
inline typename Isa::Int zero_offset(const WeightStruct& w, typename Isa::Int zero, int32_t sum) {
  return w.zeros == nullptr ? Isa::set(-w.zero * sum) : Isa::multiply(zero, Isa::set(-sum));
}

// `before` (the sum over the previous groups) plus one group's integer sums, scaled.
template <int PARTS>
inline typename Isa::Float add_scaled(const typename Isa::Int* sums, typename Isa::Float scale, float row_scale,
                                      typename Isa::Float before) {
  typename Isa::Int whole = sums[0];
  if constexpr (PARTS == 2) whole = Isa::add(Isa::template shift_left<8>(whole), sums[1]);
  return Isa::fused(Isa::times(Isa::to_float(whole), scale), Isa::set_float(row_scale), before);
}

inline void store_block(const MatmulTask& t, int64_t m, int64_t block, const float* values) {
  const int64_t first = block * kBlock, count = minimum(kBlock, t.w.outputs - first), at = m * t.w.outputs + first;
  for (int64_t i = 0; i < count; ++i) {
    const float value = t.w.bias == nullptr ? values[i] : values[i] + t.w.bias[first + i];
    t.y[at + i] = t.addend == nullptr ? value : value + t.addend[at + i];
  }
}

// ---- few rows: R rows by the outputs of kStreamBlocks blocks, all groups ----

// Processors prefetch sequential reads, but not beyond a page of 4 KiB. Prefetching every line a page ahead raised the
// speed with one row from 0.82 to 0.96 of that of a plain read (2 cores; 0.90 with one block at a time).
constexpr int kCodesAhead = 4096, kScalesAhead = 1024;  // bytes

inline Grid load_grid_prefetching(const WeightStruct& w, int64_t block, int64_t group) {
  const int64_t first = (block * w.groups + group) * kBlock * (w.half_scales ? 2 : 4);
  __builtin_prefetch(static_cast<const uint8_t*>(w.scales) + first + kScalesAhead, 0, 2);
  return load_grid(w, block, group);
}

// Two blocks at a time read memory faster, but with many rows their sums do not fit into the registers.
template <int R, int PARTS>
constexpr int kStreamBlocks = R * PARTS > 8 ? 1 : Isa::kStreamBlocks;

template <int BITS, int R, int PARTS>
void stream(const MatmulTask& t, int64_t m, int64_t block) {
  constexpr int kS = kSlices<BITS>, kB = kStreamBlocks<R, PARTS>;
  constexpr int kChains = R * kB == 1 ? 4 : R * kB == 2 ? 2 : 1;  // independent sums: a dot product takes 5 cycles
  const WeightStruct& w = t.w;
  const int vectors = w.run * BITS / 32;
  const int64_t row_bytes = w.run * (4 / Isa::kInputs), block_bytes = w.groups * vectors * 64;
  const int64_t first_position = row_position(t, m);
  const uint8_t* codes = w.codes + block * block_bytes;
  typename Isa::Float y[R][kB * kVectors];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kB * kVectors; ++c) y[r][c] = Isa::set_float(0.0f);
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t position = first_position + g * t.unit_rows;
    const uint8_t* x[PARTS];
    for (int p = 0; p < PARTS; ++p) x[p] = t.split[p] + position * row_bytes;
    typename Isa::Int sums[R][kB * kVectors][kChains][PARTS];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kB * kVectors; ++c)
        for (int i = 0; i < kChains; ++i)
          for (int p = 0; p < PARTS; ++p) sums[r][c][i][p] = Isa::set(0);
    for (int v = 0; v < vectors; v += 2) {
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) {
#pragma GCC unroll 4
        for (int c = 0; c < kB * kVectors; ++c) {
          const uint8_t* from = codes + c / kVectors * block_bytes + u * 64 + c % kVectors * Isa::kLanes * 4;
          if (c % kVectors == 0) __builtin_prefetch(from + kCodesAhead, 0, 3);
          const typename Isa::Int packed = Isa::load(from);
          auto multiply_slice = [&](auto s) {
            constexpr int kSlice = decltype(s)::value;
            const typename Isa::Int code = slice<BITS, kSlice>(packed);
            const int i = (u * kS + kSlice) % kChains;
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
              for (int p = 0; p < PARTS; ++p)
                sums[r][c][i][p] =
                    Isa::dot(sums[r][c][i][p], code, load32(x[p] + r * row_bytes + (u * kS + kSlice) * 4));
          };
          unrolled_for<kS>(multiply_slice);
        }
      }
      codes += 128;
      for (int p = 0; p < PARTS; ++p) x[p] += 2 * kS * 4;
    }
#pragma GCC unroll 2
    for (int b = 0; b < kB; ++b) {
      const Grid grid = load_grid_prefetching(w, block + b, g);
      for (int r = 0; r < R; ++r) {
        for (int h = 0; h < kVectors; ++h) {
          const int c = b * kVectors + h;
          typename Isa::Int total[PARTS];
          for (int p = 0; p < PARTS; ++p) {
            total[p] = sums[r][c][0][p];
            for (int i = 1; i < kChains; ++i) total[p] = Isa::add(total[p], sums[r][c][i][p]);
          }
          total[PARTS - 1] = Isa::add(total[PARTS - 1], zero_offset(w, grid.zero[h], t.sum[position + r]));
          y[r][c] = add_scaled<PARTS>(total, grid.scale[h], t.scale[position + r], y[r][c]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    float values[kB * kBlock];
    for (int c = 0; c < kB * kVectors; ++c) Isa::store_float(values + c * Isa::kLanes, y[r][c]);
    for (int b = 0; b < kB; ++b)
      if ((block + b) * kBlock < w.outputs) store_block(t, m + r, block + b, values + b * kBlock);
  }
}

// ---- many rows: a group's codes of 32 outputs are unpacked, then multiplied by R rows at a time ----

struct BlockScratch {
  alignas(64) uint8_t codes[kMaxRun / Isa::kInputs * 128];  // (steps, 32 outputs, 4 bytes)
  alignas(64) float y[kMaxRows * kPair];                    // sums over the groups so far
};

template <int BITS>
void unpack_group(const WeightStruct& w, int64_t pair, int64_t group, uint8_t* out) {
  constexpr int kS = kSlices<BITS>;
  const int vectors = w.run * BITS / 32;
  for (int b = 0; b < 2; ++b) {
    const uint8_t* codes = w.codes + ((2 * pair + b) * w.groups + group) * vectors * 64;
    for (int v = 0; v < vectors; ++v) {
      for (int h = 0; h < kVectors; ++h) {
        const int lane = h * Isa::kLanes * 4;
        const typename Isa::Int packed = Isa::load(codes + v * 64 + lane);
        unrolled_for<kS>([&](auto s) {
          Isa::store(out + (v * kS + s.value) * 128 + b * 64 + lane, slice<BITS, s.value>(packed));
        });
      }
    }
  }
}

// Multiply R rows, the first at `position`, by Isa::kColumns registers of outputs of a group of RUN inputs. Not inlined,
// and the stride of rows a constant: otherwise gcc 12 moves sums between registers.
template <int R, int PARTS, int RUN>
__attribute__((noinline)) void multiply_tile(const MatmulTask& t, int64_t position, const uint8_t* codes,
                                             const typename Isa::Float* scale, const typename Isa::Int* zero, float* y) {
  constexpr int kC = Isa::kColumns, kRowBytes = RUN * (4 / Isa::kInputs);
  const uint8_t* x[PARTS];
  for (int p = 0; p < PARTS; ++p) x[p] = t.split[p] + position * kRowBytes;
  typename Isa::Int sums[R][kC][PARTS];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) {
      sums[r][c][0] = Isa::set(0);
      sums[r][c][PARTS - 1] = zero_offset(t.w, zero[c], t.sum[position + r]);
    }
  for (int k = 0; k < RUN / Isa::kInputs; ++k) {
    typename Isa::Int code[kC];
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) code[c] = Isa::load(codes + k * 128 + c * Isa::kLanes * 4);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < PARTS; ++p) {
        const int32_t value = load32(x[p] + r * kRowBytes + k * 4);
#pragma GCC unroll 4
        for (int c = 0; c < kC; ++c) sums[r][c][p] = Isa::dot(sums[r][c][p], code[c], value);
      }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) {
      float* to = y + r * kPair + c * Isa::kLanes;
      Isa::store_float(to, add_scaled<PARTS>(sums[r][c], scale[c], t.scale[position + r], Isa::load_float(to)));
    }
}

using TileFunction = void (*)(const MatmulTask&, int64_t, const uint8_t*, const typename Isa::Float*,
                              const typename Isa::Int*, float*);

template <int R, int PARTS>
TileFunction tile_function(int run) {
  return run == 128 ? multiply_tile<R, PARTS, 128> : run == 64 ? multiply_tile<R, PARTS, 64> : multiply_tile<R, PARTS, 32>;
}

// The same for the last rows, fewer than R.
template <int R, int PARTS>
TileFunction rest_function(int run, int64_t rows) {
  if constexpr (R > 1) {
    return rows < R - 1 ? rest_function<R - 1, PARTS>(run, rows) : tile_function<R - 1, PARTS>(run);
  } else {
    return nullptr;
  }
}

template <int BITS, int PARTS>
void multiply_block(const MatmulTask& t, int64_t row_begin, int64_t row_end, int64_t pair, BlockScratch& scratch) {
  constexpr int kRows = PARTS == 2 ? Isa::kTileRows / 2 : Isa::kTileRows;
  const int64_t rows = row_end - row_begin, first_position = row_position(t, row_begin), full = rows / kRows * kRows;
  const TileFunction tile = tile_function<kRows, PARTS>(t.w.run), rest = rest_function<kRows, PARTS>(t.w.run, rows - full);
  for (int64_t i = 0; i < rows * kPair; ++i) scratch.y[i] = 0.0f;
  for (int64_t g = 0; g < t.w.groups; ++g) {
    unpack_group<BITS>(t.w, pair, g, scratch.codes);
    const Grid grids[2] = {load_grid(t.w, 2 * pair, g), load_grid(t.w, 2 * pair + 1, g)};
    typename Isa::Float scale[2 * kVectors];
    typename Isa::Int zero[2 * kVectors];
    for (int c = 0; c < 2 * kVectors; ++c) {
      scale[c] = grids[c / kVectors].scale[c % kVectors];
      zero[c] = grids[c / kVectors].zero[c % kVectors];
    }
    for (int c = 0; c < 2 * kVectors; c += Isa::kColumns) {
      const int lane = c * Isa::kLanes;
      for (int64_t m = 0; m < rows; m += kRows) {
        (m < full ? tile : rest)(t, first_position + g * t.unit_rows + m, scratch.codes + lane * 4, scale + c, zero + c,
                                 scratch.y + m * kPair + lane);
      }
    }
  }
  for (int64_t m = 0; m < rows; ++m)
    for (int b = 0; b < 2; ++b)
      if ((2 * pair + b) * kBlock < t.w.outputs)
        store_block(t, row_begin + m, 2 * pair + b, scratch.y + m * kPair + b * kBlock);
}

// ---- the choice of the loop ----

// All blocks for up to R rows.
template <int BITS, int PARTS, int R>
void stream_rows(const MatmulTask& t, int64_t m, int64_t rows, int64_t block, int64_t end) {
  if (rows == R) {
    for (; block < end; block += kStreamBlocks<R, PARTS>) stream<BITS, R, PARTS>(t, m, block);
  } else if constexpr (R > 1) {
    stream_rows<BITS, PARTS, R - 1>(t, m, rows, block, end);
  }
}

template <int BITS, int PARTS>
void multiply_parts(const MatmulTask& t, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end) {
  const int64_t rows = row_end - row_begin;
  if (rows <= Isa::kStreamPasses * Isa::kStreamRows) {
    const int64_t passes = (rows + Isa::kStreamRows - 1) / Isa::kStreamRows, height = (rows + passes - 1) / passes;
    for (int64_t pair = pair_begin; pair < pair_end; ++pair)
      for (int64_t m = 0; m < rows; m += height)
        stream_rows<BITS, PARTS, Isa::kStreamRows>(t, row_begin + m, minimum(height, rows - m), 2 * pair, 2 * pair + 2);
  } else {
    BlockScratch scratch;
    for (int64_t pair = pair_begin; pair < pair_end; ++pair)
      multiply_block<BITS, PARTS>(t, row_begin, row_end, pair, scratch);
  }
}

// If activations are words of 16 bits, both parts are in one.
template <int BITS>
void multiply_bits(const MatmulTask& t, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end) {
  if (Isa::kInputs == 4 && t.parts == 2) {
    multiply_parts<BITS, Isa::kInputs == 4 ? 2 : 1>(t, row_begin, row_end, pair_begin, pair_end);
  } else {
    multiply_parts<BITS, 1>(t, row_begin, row_end, pair_begin, pair_end);
  }
}

void multiply(const MatmulTask& t, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end) {
  switch (t.w.bits) {
    case 2: return multiply_bits<2>(t, row_begin, row_end, pair_begin, pair_end);
    case 4: return multiply_bits<4>(t, row_begin, row_end, pair_begin, pair_end);
    default: return multiply_bits<8>(t, row_begin, row_end, pair_begin, pair_end);
  }
}

// ---- a plain read: the upper bound for the speed of products with few rows ----

uint32_t read(const uint8_t* bytes, int64_t size) {
  constexpr int kSums = 8, kStep = kSums * Isa::kLanes * 4;
  typename Isa::Int sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = Isa::set(0);
  for (int64_t at = 0; at < size; at += kStep) {
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) {
      const uint8_t* from = bytes + at + i * Isa::kLanes * 4;
      if (i * Isa::kLanes % 16 == 0) __builtin_prefetch(from + kCodesAhead, 0, 3);
      sums[i] = Isa::add(sums[i], Isa::load(from));
    }
  }
  for (int i = 1; i < kSums; ++i) sums[0] = Isa::add(sums[0], sums[i]);
  uint8_t lanes[Isa::kLanes * 4];
  Isa::store(lanes, sums[0]);
  uint32_t sum = 0;
  for (int i = 0; i < Isa::kLanes; ++i) sum += static_cast<uint32_t>(load32(lanes + 4 * i));
  return sum;
}

}  // namespace
}  // namespace belle
