// AMX: tiles of 16 rows by 64 bytes. Few rows use the VNNI code, whose results are the same to the bit: integer sums
// are exact, and the same operations scale and add them in the same order.
//
// The work is divided so that reads from the second-level cache keep up with the products: a chunk of 2048 inputs by 64
// outputs (a "panel") is unpacked, minus its zero points, in the order in which tiles are loaded. Then it is multiplied
// by strips of 64 rows, each with its sums so far in the first-level cache. Between chunks the sums are stored in y.
//
// A group's codes of 16 outputs are up to two tiles of 64 inputs, which stay in tile registers for a whole strip. They
// are multiplied by two tiles of activations at a time: the two parts of the same rows, or two tiles of rows. There are
// two sets of sums: while one is multiplied, the other is written to memory and the one before it is scaled. Measured
// for 16 rows by 16 outputs by 128 inputs in two parts, within the caches: 64 ns, of which products alone take 29. With
// zeros as data it is 38 and 19: random data is limited by the clock rate that the processor reaches under that load.

#include "isa_avx512vnni.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace belle {
namespace {

constexpr int kMaxTileRows = 16;
constexpr int kAmxStreamRows = 4;
constexpr int kStripRows = 64;
constexpr int kPanelBlocks = 4;    // blocks of outputs
constexpr int kPortionPanels = 8;  // panels that are multiplied by the same chunk of activations in turn
constexpr int kChunkInputs = 2048;
constexpr int kPanelOutputs = kPanelBlocks * kBlock;

// Two tiles of sums: of the two parts of the same rows, or of two tiles of rows.
struct SumTiles {
  int64_t position;  // of the first row, in t.scale and t.sum
  int64_t rows;      // from the first row to the last one that exists
  float* y;          // (rows, kPanelOutputs), at the block's first output
  const Grid* grid;  // its zero point: still to subtract (for 8 bits only, because code - zero has 9 bits)
};

struct Workspace {
  alignas(64) int8_t codes[kChunkInputs * kPanelOutputs];  // (groups, blocks, steps of 4 inputs, 16 outputs by 4)
  alignas(64) int32_t sums[2][2][kMaxTileRows][kBlock];  // (sets, tiles)
  alignas(64) float y[kStripRows * kPanelOutputs];
  Grid grids[kChunkInputs / 32][kPanelBlocks];  // (groups, blocks)
  SumTiles tiles[4];  // the latest ones, number j at j % 4; its sums are in set j % 2
  int64_t pushed;     // how many were pushed so far
};

// What one call multiplies: the first row, block of outputs and group of inputs, and how many of each.
struct Range {
  int64_t row, rows;
  int64_t block;
  int blocks;
  int64_t group, groups;
};

struct alignas(64) AmxTileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Make the compiler finish writes before tiles are loaded: its intrinsics do not declare that they read memory.
inline void compiler_barrier() { asm volatile("" ::: "memory"); }

// Tiles 0..3 are sums (two per set), 4 and 5 activations, 6 and 7 codes.
void configure_tiles(int rows, int run) {
  const int inputs = run < 64 ? run : 64;
  AmxTileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : inputs / 4);
    config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? inputs : 64);
  }
  compiler_barrier();
  _tile_loadconfig(&config);
}

// Unpack the codes of one block and group to signed bytes (run / 4, 16, 4), load its grid, and prefetch the next panel.
template <int BITS>
void unpack_signed(const WeightStruct& w, int64_t block, int64_t group, int8_t* out, Grid& grid) {
  constexpr int kS = 8 / BITS;
  const int vectors = w.run * BITS / 32;
  const uint8_t* codes = w.codes + (block * w.groups + group) * vectors * 64;
  const uint8_t* next = codes + kPanelBlocks * w.groups * vectors * 64;
  grid = load_grid(w, block, group);
  __m512i offset;
  if constexpr (BITS == 8) {  // inverting its highest bit makes a code the signed number code - 128
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
void unpack_panel(const WeightStruct& w, const Range& range, Workspace& to) {
  for (int b = 0; b < range.blocks; ++b)
    for (int64_t g = 0; g < range.groups; ++g)
      unpack_signed<BITS>(w, range.block + b, range.group + g, to.codes + (g * kPanelBlocks + b) * w.run * kBlock,
                          to.grids[g][b]);
  compiler_barrier();
}

// Scale `count` rows of sums and add them to y. SUBTRACT: a zero point remains to be subtracted.
template <int PARTS, bool SUBTRACT>
inline __attribute__((always_inline)) void scale_rows(const MatmulTask& t, const SumTiles& tiles,
                                                      const int32_t (*high)[kBlock], const int32_t (*low)[kBlock],
                                                      int first, int count) {
  const __m512 scale = tiles.grid->scale[0];
  const float* row_scale = t.scale + tiles.position + first;
  const int32_t* sum = t.sum + tiles.position + first;
  float* y = tiles.y + first * kPanelOutputs;
#pragma GCC unroll 16
  for (int r = 0; r < count; ++r) {
    __m512i whole = _mm512_load_si512(high[r]);
    if constexpr (PARTS == 2) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), _mm512_load_si512(low[r]));
    if constexpr (SUBTRACT) {
      whole = _mm512_sub_epi32(whole, _mm512_mullo_epi32(tiles.grid->zero[0], _mm512_set1_epi32(sum[r])));
    }
    const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale);
    float* to = y + r * kPanelOutputs;
    _mm512_store_ps(to, _mm512_fmadd_ps(value, _mm512_set1_ps(row_scale[r]), _mm512_load_ps(to)));
  }
}

template <int PARTS, bool SUBTRACT>
inline void scale_tiles(const MatmulTask& t, const Workspace& s, int64_t index, int tile_rows) {
  const SumTiles& tiles = s.tiles[index % 4];
  const auto* sums = s.sums[index % 2];
  const int rows = static_cast<int>(minimum(PARTS == 2 ? tile_rows : 2 * tile_rows, tiles.rows));
  if (tile_rows == kMaxTileRows && rows == (PARTS == 2 ? kMaxTileRows : 2 * kMaxTileRows)) {  // loops unrolled
    scale_rows<PARTS, SUBTRACT>(t, tiles, sums[0], sums[1], 0, kMaxTileRows);
    if constexpr (PARTS == 1) scale_rows<1, SUBTRACT>(t, tiles, sums[1], nullptr, kMaxTileRows, kMaxTileRows);
  } else if (PARTS == 2) {
    scale_rows<PARTS, SUBTRACT>(t, tiles, sums[0], sums[1], 0, rows);
  } else {
    scale_rows<1, SUBTRACT>(t, tiles, sums[0], nullptr, 0, static_cast<int>(minimum(tile_rows, rows)));
    scale_rows<1, SUBTRACT>(t, tiles, sums[1], nullptr, tile_rows, rows - tile_rows);
  }
}

// The intrinsics take tile numbers as literals only, so both sets are spelt out.
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

// Multiply 64 inputs of two tiles of activations, `run` bytes per row, by step STEP of the codes.
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

// Multiply tiles j into set SET, scale tiles j - 3, and then write tiles j - 1 (the other set) to the memory of those.
// Scaling what was just written would wait until all earlier products have retired: 40 cycles more per tile.
template <int PARTS, bool SUBTRACT, int SET>
inline void push(const MatmulTask& t, Workspace& s, const uint8_t* first, const uint8_t* second, const SumTiles& tiles,
                 int tile_rows) {
  clear_set<SET>();
  multiply_step<SET, 0>(first, second, t.w.run);
  if (t.w.run > 64) multiply_step<SET, 1>(first, second, t.w.run);
  if (s.pushed >= 3) scale_tiles<PARTS, SUBTRACT>(t, s, s.pushed - 3, tile_rows);
  if (s.pushed >= 1) store_set<1 - SET>(s);
  s.tiles[s.pushed % 4] = tiles;
  ++s.pushed;
}

// Write and scale the tiles that are not finished yet.
template <int PARTS, bool SUBTRACT>
inline void flush(const MatmulTask& t, Workspace& s, int tile_rows) {
  const int64_t last = s.pushed - 1;
  for (int64_t j = last > 2 ? last - 2 : 0; j < last; ++j) scale_tiles<PARTS, SUBTRACT>(t, s, j, tile_rows);
  if (last % 2 == 0) {
    store_set<0>(s);
  } else {
    store_set<1>(s);
  }
  scale_tiles<PARTS, SUBTRACT>(t, s, last, tile_rows);
  s.pushed = 0;
}

// Mask of the outputs that exist among the 16 from `first` on.
inline __mmask16 outputs_mask(const WeightStruct& w, int64_t first) {
  const int64_t count = w.outputs - first;
  return count >= kBlock ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

// Load the sums over the previous groups from y, or zeros before the first group. Outputs after N are not in y.
void load_sums(const MatmulTask& t, const Range& range, float* sums) {
  for (int64_t r = 0; r < range.rows; ++r) {
    const float* y = t.y + (range.row + r) * t.w.outputs;
    for (int b = 0; b < range.blocks; ++b) {
      const int64_t first = (range.block + b) * kBlock;
      const __mmask16 mask = range.group == 0 ? 0 : outputs_mask(t.w, first);
      _mm512_store_ps(sums + r * kPanelOutputs + b * kBlock, _mm512_maskz_loadu_ps(mask, y + first));
    }
  }
}

void store_sums(const MatmulTask& t, const Range& range, const float* sums) {
  const bool finished = range.group + range.groups == t.w.groups;
  for (int64_t r = 0; r < range.rows; ++r) {
    const int64_t row = (range.row + r) * t.w.outputs;
    for (int b = 0; b < range.blocks; ++b) {
      const int64_t first = (range.block + b) * kBlock;
      const __mmask16 mask = outputs_mask(t.w, first);
      __m512 values = _mm512_load_ps(sums + r * kPanelOutputs + b * kBlock);
      if (finished && t.w.bias != nullptr) {
        values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, t.w.bias + first));
      }
      if (finished && t.addend != nullptr) {
        values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(mask, t.addend + row + first));
      }
      _mm512_mask_storeu_ps(t.y + row + first, mask, values);
    }
  }
}

// Multiply a strip of rows by an unpacked panel.
template <int PARTS, bool SUBTRACT>
void multiply_strip(const MatmulTask& t, const Range& range, int tile_rows, Workspace& s) {
  const int run = t.w.run, step = PARTS == 2 ? tile_rows : 2 * tile_rows;
  load_sums(t, range, s.y);
  for (int64_t g = 0; g < range.groups; ++g) {
    const int64_t position = row_position(t, range.row) + (range.group + g) * t.unit_rows;
    const uint8_t* first = t.split[0] + position * run;
    const uint8_t* second = PARTS == 2 ? t.split[1] + position * run : first + tile_rows * run;
    for (int b = 0; b < range.blocks; ++b) {
      const int8_t* codes = s.codes + (g * kPanelBlocks + b) * run * kBlock;
      _tile_loadd(6, codes, 64);
      if (run > 64) _tile_loadd(7, codes + 64 * kBlock, 64);
      for (int64_t m = 0; m < range.rows; m += step) {
        const SumTiles tiles{position + m, range.rows - m, s.y + m * kPanelOutputs + b * kBlock, &s.grids[g][b]};
        if (s.pushed & 1) {
          push<PARTS, SUBTRACT, 1>(t, s, first + m * run, second + m * run, tiles, tile_rows);
        } else {
          push<PARTS, SUBTRACT, 0>(t, s, first + m * run, second + m * run, tiles, tile_rows);
        }
      }
    }
  }
  flush<PARTS, SUBTRACT>(t, s, tile_rows);
  store_sums(t, range, s.y);
}

template <int BITS, int PARTS, bool SUBTRACT>
void multiply_portion(const MatmulTask& t, const Range& portion, int tile_rows, Workspace& s) {
  const int64_t chunk = kChunkInputs / t.w.run, rows = kStripRows / (2 * tile_rows) * (2 * tile_rows);
  for (int64_t group = 0; group < t.w.groups; group += chunk) {
    for (int b = 0; b < portion.blocks; b += kPanelBlocks) {
      Range range{0, 0, portion.block + b, static_cast<int>(minimum(kPanelBlocks, portion.blocks - b)), group,
              minimum(chunk, t.w.groups - group)};
      unpack_panel<BITS>(t.w, range, s);
      for (int64_t m = 0; m < portion.rows; m += rows) {
        range.row = portion.row + m;
        range.rows = minimum(rows, portion.rows - m);
        multiply_strip<PARTS, SUBTRACT>(t, range, tile_rows, s);
      }
    }
  }
}

template <int BITS, int PARTS>
void multiply_portions(const MatmulTask& t, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end) {
  // Tiles of equal height: 17 rows are two tiles of 9, not one of 16 and one that is nearly empty.
  const int64_t rows = row_end - row_begin, unit = PARTS == 2 ? kMaxTileRows : 2 * kMaxTileRows;
  const int64_t count = (rows + unit - 1) / unit * (unit / kMaxTileRows);
  const int tile_rows = static_cast<int>((rows + count - 1) / count);
  const bool subtract = BITS == 8 && (t.w.zeros != nullptr || t.w.zero != 128);
  Workspace s;
  s.pushed = 0;
  configure_tiles(tile_rows, t.w.run);
  for (int64_t block = 2 * pair_begin; block < 2 * pair_end; block += kPortionPanels * kPanelBlocks) {
    const int blocks = static_cast<int>(minimum(kPortionPanels * kPanelBlocks, 2 * pair_end - block));
    const Range range{row_begin, rows, block, blocks, 0, 0};
    if (subtract) {
      multiply_portion<BITS, PARTS, BITS == 8>(t, range, tile_rows, s);
    } else {
      multiply_portion<BITS, PARTS, false>(t, range, tile_rows, s);
    }
  }
  _tile_release();
}

template <int BITS>
void multiply_tiles(const MatmulTask& t, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end) {
  if (t.parts == 2) {
    multiply_portions<BITS, 2>(t, row_begin, row_end, pair_begin, pair_end);
  } else {
    multiply_portions<BITS, 1>(t, row_begin, row_end, pair_begin, pair_end);
  }
}

void multiply_amx(const MatmulTask& t, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end) {
  if (row_end - row_begin <= kAmxStreamRows) return multiply(t, row_begin, row_end, pair_begin, pair_end);
  switch (t.w.bits) {
    case 2: return multiply_tiles<2>(t, row_begin, row_end, pair_begin, pair_end);
    case 4: return multiply_tiles<4>(t, row_begin, row_end, pair_begin, pair_end);
    default: return multiply_tiles<8>(t, row_begin, row_end, pair_begin, pair_end);
  }
}

constexpr IsaKernels with_tiles() {
  IsaKernels kernels = kKernels;
  kernels.stream_rows = kAmxStreamRows;
  kernels.chunk_inputs = kChunkInputs;
  kernels.multiply = multiply_amx;
  return kernels;
}

}  // namespace
}  // namespace belle

const belle::IsaKernels belle::kAmx = belle::with_tiles();

bool belle::amx_usable() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
