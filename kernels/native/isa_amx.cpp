// AMX: tiles of 16 rows by 64 bytes. Few rows take the VNNI code, whose results are the same to the bit: sums of
// integers are exact, and the same operations scale and add them in the same order.
//
// The work is cut so that the second-level cache is read, at most, as fast as products need: a chunk of 2048 inputs of 64
// outputs (a panel) is unpacked, minus its zeros, in just the order in which tiles are loaded; then strips of 64 rows meet
// it, each with its results so far in the first-level cache. Between chunks they wait in y itself.
//
// A group's codes of 16 outputs are up to two tiles of 64 inputs; they stay in tile registers while a strip passes. Two
// tiles of activations meet them at a time: the two parts of the same rows, or two tiles of rows. Their sums are one of
// two sets: while one set is multiplied, the other is written to memory and the one before it is scaled. Measured for 16
// rows by 16 outputs by 128 inputs in two parts, within the caches: 64 ns, of which products alone take 29. With zeros for
// data it is 38 and 19: what bounds random data is how fast the processor clocks under that load.

#include "isa_avx512vnni.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace belle {
namespace {

constexpr int kTileMost = 16;      // rows of a tile
constexpr int kStrip = 64;         // rows
constexpr int kPanel = 4;          // blocks of outputs
constexpr int kPortion = 8;        // panels that meet the same chunk of activations one after the other
constexpr int kChunk = 2048;       // inputs
constexpr int kWidth = kPanel * kBlock;

// Two tiles of sums: of two parts, or of two tiles of rows.
struct Job {
  int64_t place;  // of the first row, in t.scale and t.sum
  int64_t rows;   // from the first row on that there are
  float* y;       // (rows, kWidth), at the block's first output
  const Grid* grid;  // its zero: what the codes still lack (of 8 bits only, whose difference to a zero has 9)
};

struct Workspace {
  alignas(64) int8_t codes[kChunk * kWidth];  // (groups, blocks, steps of 4 inputs, 16 outputs by 4)
  alignas(64) int32_t sums[2][2][kTileMost][kBlock];  // (sets, tiles)
  alignas(64) float y[kStrip * kWidth];
  Grid grids[kChunk / 32][kPanel];  // (groups, blocks)
  Job jobs[4];     // the latest ones, job j at j % 4; its sums are in set j % 2
  int64_t pushed;  // so many so far
};

// What one call of `strip` multiplies.
struct Cut {
  int64_t row, rows;      // of x
  int64_t block;          // of outputs
  int blocks;
  int64_t group, groups;  // of inputs
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// What was written before is in memory when tiles are read: the compiler's intrinsics do not say that they read it.
inline void written() { asm volatile("" ::: "memory"); }

// Tiles 0..3 are sums (two a set), 4 and 5 activations, 6 and 7 codes.
void configure(int rows, int run) {
  const int inputs = run < 64 ? run : 64;
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : inputs / 4);
    config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? inputs : 64);
  }
  written();
  _tile_loadconfig(&config);
}

// The codes of one block and group as signed bytes (run / 4, 16, 4), and its grid. The panel behind this one is asked for.
template <int BITS>
void unpack_signed(const WeightStruct& w, int64_t block, int64_t group, int8_t* out, Grid& grid) {
  constexpr int kS = 8 / BITS;
  const int vectors = w.run * BITS / 32;
  const uint8_t* codes = w.codes + (block * w.groups + group) * vectors * 64;
  const uint8_t* next = codes + kPanel * w.groups * vectors * 64;
  grid = load_grid(w, block, group);
  __m512i offset;
  if constexpr (BITS == 8) {  // with its highest bit turned, a code is code - 128, signed
    offset = _mm512_set1_epi8(-128);
    grid.zero[0] = _mm512_sub_epi32(grid.zero[0], _mm512_set1_epi32(128));
  } else {
    offset = _mm512_mullo_epi32(grid.zero[0], _mm512_set1_epi32(0x01010101));
  }
  for (int v = 0; v < vectors; ++v) {
    __builtin_prefetch(next + v * 64, 0, 2);
    const __m512i packed = _mm512_loadu_si512(codes + v * 64);
    unrolled_for<kS>([&](auto s) {
      _mm512_store_si512(out + (v * kS + s.value) * 64,
                         _mm512_sub_epi8(slice<BITS, decltype(s)::value>(packed), offset));
    });
  }
}

template <int BITS>
void unpack_panel(const WeightStruct& w, const Cut& cut, Workspace& to) {
  for (int b = 0; b < cut.blocks; ++b)
    for (int64_t g = 0; g < cut.groups; ++g)
      unpack_signed<BITS>(w, cut.block + b, cut.group + g, to.codes + (g * kPanel + b) * w.run * kBlock,
                          to.grids[g][b]);
  written();
}

// Scale `count` rows of sums and add them to y; LACK: the codes lack a zero.
template <int PARTS, bool LACK>
inline __attribute__((always_inline)) void scale_rows(const MatmulTask& t, const Job& job, const int32_t (*high)[kBlock],
                                                      const int32_t (*low)[kBlock], int first, int count) {
  const __m512 scale = job.grid->scale[0];
  const float* row_scale = t.scale + job.place + first;
  const int32_t* sum = t.sum + job.place + first;
  float* y = job.y + first * kWidth;
#pragma GCC unroll 16
  for (int r = 0; r < count; ++r) {
    __m512i whole = _mm512_load_si512(high[r]);
    if constexpr (PARTS == 2) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), _mm512_load_si512(low[r]));
    if constexpr (LACK) whole = _mm512_sub_epi32(whole, _mm512_mullo_epi32(job.grid->zero[0], _mm512_set1_epi32(sum[r])));
    const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale);
    float* to = y + r * kWidth;
    _mm512_store_ps(to, _mm512_fmadd_ps(value, _mm512_set1_ps(row_scale[r]), _mm512_load_ps(to)));
  }
}

template <int PARTS, bool LACK>
inline void scale_job(const MatmulTask& t, const Workspace& s, int64_t index, int tile_rows) {
  const Job& job = s.jobs[index % 4];
  const auto* sums = s.sums[index % 2];
  const int rows = static_cast<int>(least(PARTS == 2 ? tile_rows : 2 * tile_rows, job.rows));
  if (tile_rows == kTileMost && rows == (PARTS == 2 ? kTileMost : 2 * kTileMost)) {  // whole tiles, loops unrolled
    scale_rows<PARTS, LACK>(t, job, sums[0], sums[1], 0, kTileMost);
    if constexpr (PARTS == 1) scale_rows<1, LACK>(t, job, sums[1], nullptr, kTileMost, kTileMost);
  } else if (PARTS == 2) {
    scale_rows<PARTS, LACK>(t, job, sums[0], sums[1], 0, rows);
  } else {
    scale_rows<1, LACK>(t, job, sums[0], nullptr, 0, static_cast<int>(least(tile_rows, rows)));
    scale_rows<1, LACK>(t, job, sums[1], nullptr, tile_rows, rows - tile_rows);
  }
}

// The compiler takes tile numbers as literals only: hence both sets spelt out.
template <int SET>
inline void clear_set() {
  if constexpr (SET == 0) {
    _tile_zero(0);
    _tile_zero(1);
  } else {
    _tile_zero(2);
    _tile_zero(3);
  }
}

template <int SET>
inline void store_set(Workspace& s) {
  if constexpr (SET == 0) {
    _tile_stored(0, s.sums[0][0], 64);
    _tile_stored(1, s.sums[0][1], 64);
  } else {
    _tile_stored(2, s.sums[1][0], 64);
    _tile_stored(3, s.sums[1][1], 64);
  }
}

// 64 inputs of two tiles of activations, `run` bytes a row, by step STEP of the codes.
template <int SET, int STEP>
inline void multiply_step(const uint8_t* first, const uint8_t* second, int run) {
  _tile_loadd(4, first + 64 * STEP, run);
  if constexpr (SET == 0 && STEP == 0) _tile_dpbssd(0, 4, 6);
  if constexpr (SET == 0 && STEP == 1) _tile_dpbssd(0, 4, 7);
  if constexpr (SET == 1 && STEP == 0) _tile_dpbssd(2, 4, 6);
  if constexpr (SET == 1 && STEP == 1) _tile_dpbssd(2, 4, 7);
  _tile_loadd(5, second + 64 * STEP, run);
  if constexpr (SET == 0 && STEP == 0) _tile_dpbssd(1, 5, 6);
  if constexpr (SET == 0 && STEP == 1) _tile_dpbssd(1, 5, 7);
  if constexpr (SET == 1 && STEP == 0) _tile_dpbssd(3, 5, 6);
  if constexpr (SET == 1 && STEP == 1) _tile_dpbssd(3, 5, 7);
}

// Multiply into set SET, and write the other set, job j - 1, to where job j - 3 is scaled before. Scaling what was just
// written would wait until all products before have retired: 40 cycles a tile more.
template <int PARTS, bool LACK, int SET>
inline void push(const MatmulTask& t, Workspace& s, const uint8_t* first, const uint8_t* second, const Job& job,
                 int tile_rows) {
  clear_set<SET>();
  multiply_step<SET, 0>(first, second, t.w.run);
  if (t.w.run > 64) multiply_step<SET, 1>(first, second, t.w.run);
  if (s.pushed >= 3) scale_job<PARTS, LACK>(t, s, s.pushed - 3, tile_rows);
  if (s.pushed >= 1) store_set<1 - SET>(s);
  s.jobs[s.pushed % 4] = job;
  ++s.pushed;
}

// Write and scale what is still under way.
template <int PARTS, bool LACK>
inline void flush(const MatmulTask& t, Workspace& s, int tile_rows) {
  const int64_t last = s.pushed - 1;
  for (int64_t j = last > 2 ? last - 2 : 0; j < last; ++j) scale_job<PARTS, LACK>(t, s, j, tile_rows);
  if (last % 2 == 0) {
    store_set<0>(s);
  } else {
    store_set<1>(s);
  }
  scale_job<PARTS, LACK>(t, s, last, tile_rows);
  s.pushed = 0;
}

// Which of the 16 outputs from `first` on there are.
inline __mmask16 outputs_mask(const WeightStruct& w, int64_t first) {
  const int64_t count = w.outputs - first;
  return count >= kBlock ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

// What the groups before gave, or zeros; and back. Outputs behind N have no place in y.
void load_results(const MatmulTask& t, const Cut& cut, float* results) {
  for (int64_t r = 0; r < cut.rows; ++r) {
    const float* y = t.y + (cut.row + r) * t.w.outputs;
    for (int b = 0; b < cut.blocks; ++b) {
      const int64_t first = (cut.block + b) * kBlock;
      const __mmask16 mask = cut.group == 0 ? 0 : outputs_mask(t.w, first);
      _mm512_store_ps(results + r * kWidth + b * kBlock, _mm512_maskz_loadu_ps(mask, y + first));
    }
  }
}

void store_results(const MatmulTask& t, const Cut& cut, const float* results) {
  const bool finished = cut.group + cut.groups == t.w.groups;
  for (int64_t r = 0; r < cut.rows; ++r) {
    const int64_t row = (cut.row + r) * t.w.outputs;
    for (int b = 0; b < cut.blocks; ++b) {
      const int64_t first = (cut.block + b) * kBlock;
      const __mmask16 mask = outputs_mask(t.w, first);
      __m512 values = _mm512_load_ps(results + r * kWidth + b * kBlock);
      if (finished && t.w.bias != nullptr) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, t.w.bias + first));
      if (finished && t.addend != nullptr) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, t.addend + row + first));
      _mm512_mask_storeu_ps(t.y + row + first, mask, values);
    }
  }
}

// A strip of rows by an unpacked panel.
template <int PARTS, bool LACK>
void strip(const MatmulTask& t, const Cut& cut, int tile_rows, Workspace& s) {
  const int run = t.w.run, step = PARTS == 2 ? tile_rows : 2 * tile_rows;
  load_results(t, cut, s.y);
  for (int64_t g = 0; g < cut.groups; ++g) {
    const int64_t place = row_position(t, cut.row) + (cut.group + g) * t.unit_rows;
    const uint8_t* first = t.split[0] + place * run;
    const uint8_t* second = PARTS == 2 ? t.split[1] + place * run : first + tile_rows * run;
    for (int b = 0; b < cut.blocks; ++b) {
      const int8_t* codes = s.codes + (g * kPanel + b) * run * kBlock;
      _tile_loadd(6, codes, 64);
      if (run > 64) _tile_loadd(7, codes + 64 * kBlock, 64);
      for (int64_t m = 0; m < cut.rows; m += step) {
        const Job job{place + m, cut.rows - m, s.y + m * kWidth + b * kBlock, &s.grids[g][b]};
        if (s.pushed & 1) {
          push<PARTS, LACK, 1>(t, s, first + m * run, second + m * run, job, tile_rows);
        } else {
          push<PARTS, LACK, 0>(t, s, first + m * run, second + m * run, job, tile_rows);
        }
      }
    }
  }
  flush<PARTS, LACK>(t, s, tile_rows);
  store_results(t, cut, s.y);
}

template <int BITS, int PARTS, bool LACK>
void portion(const MatmulTask& t, const Cut& all, int tile_rows, Workspace& s) {
  const int64_t chunk = kChunk / t.w.run, rows = kStrip / (2 * tile_rows) * (2 * tile_rows);
  for (int64_t group = 0; group < t.w.groups; group += chunk) {
    for (int b = 0; b < all.blocks; b += kPanel) {
      Cut cut{0, 0, all.block + b, static_cast<int>(least(kPanel, all.blocks - b)), group,
              least(chunk, t.w.groups - group)};
      unpack_panel<BITS>(t.w, cut, s);
      for (int64_t m = 0; m < all.rows; m += rows) {
        cut.row = all.row + m;
        cut.rows = least(rows, all.rows - m);
        strip<PARTS, LACK>(t, cut, tile_rows, s);
      }
    }
  }
}

template <int BITS, int PARTS>
void portions(const MatmulTask& t, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end) {
  // Tiles of equal height: 17 rows are two tiles of 9, not one of 16 and one that is nearly empty.
  const int64_t rows = row_end - row_begin, unit = PARTS == 2 ? kTileMost : 2 * kTileMost;
  const int64_t count = (rows + unit - 1) / unit * (unit / kTileMost);
  const int tile_rows = static_cast<int>((rows + count - 1) / count);
  const bool lack = BITS == 8 && (t.w.zeros != nullptr || t.w.zero != 128);
  Workspace s;
  s.pushed = 0;
  configure(tile_rows, t.w.run);
  for (int64_t block = 2 * pair_begin; block < 2 * pair_end; block += kPortion * kPanel) {
    const Cut cut{row_begin, rows, block, static_cast<int>(least(kPortion * kPanel, 2 * pair_end - block)), 0, 0};
    if (lack) {
      portion<BITS, PARTS, BITS == 8>(t, cut, tile_rows, s);
    } else {
      portion<BITS, PARTS, false>(t, cut, tile_rows, s);
    }
  }
  _tile_release();
}

template <int BITS>
void tile_bits(const MatmulTask& t, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end) {
  if (t.parts == 2) {
    portions<BITS, 2>(t, row_begin, row_end, pair_begin, pair_end);
  } else {
    portions<BITS, 1>(t, row_begin, row_end, pair_begin, pair_end);
  }
}

void multiply_amx(const MatmulTask& t, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end) {
  if (row_end - row_begin <= kMaxStreamRows) return multiply(t, row_begin, row_end, pair_begin, pair_end);
  switch (t.w.bits) {
    case 2: return tile_bits<2>(t, row_begin, row_end, pair_begin, pair_end);
    case 4: return tile_bits<4>(t, row_begin, row_end, pair_begin, pair_end);
    default: return tile_bits<8>(t, row_begin, row_end, pair_begin, pair_end);
  }
}

constexpr IsaKernels with_tiles() {
  IsaKernels table = kKernels;
  table.chunk_inputs = kChunk;
  table.multiply = multiply_amx;
  return table;
}

}  // namespace
}  // namespace belle

const belle::IsaKernels belle::kAmx = belle::with_tiles();

bool belle::amx_usable() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
