// AMX: tiles of 16 rows by 64 bytes. Few rows take the VNNI code, whose results are the same to the bit: sums of
// integers are exact, and the same operations scale and add them in the same order.
//
// A group's codes of 16 outputs, minus their zeros, are up to two tiles of 64 inputs, in just the order in which they
// lie in memory; they stay in tile registers while rows of x pass. Two tiles of activations meet them at a time: the two
// parts of the same rows, or two tiles of rows. Their sums are one of two sets: while one set is multiplied, the other is
// written to memory and the one before it is scaled. Measured for 16 rows by 32 outputs by 128 inputs in two parts: 455
// cycles, where it was 490 with all sums of 32 outputs in one set; the products alone would take 142.

#include "avx512vnni.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace belle {
namespace {

constexpr int kTileMost = 16;  // rows of a tile

constexpr int kStrip = 64;     // rows whose activations of one group stay in the first-level cache for both blocks

// Two tiles of sums: of two parts, or of two tiles of rows.
struct Job {
  int64_t place;  // of the first row, in t.scale and t.sum
  int64_t rows;   // from the first row on that there are
  float* y;       // (rows, kPair), at the block's first output
  __m512 scale;
  __m512i zero;   // that the codes still lack: of 8 bits only, whose difference to a zero has 9
};

struct Workspace {
  alignas(64) int8_t codes[2][kMostRun / 64][16][64];  // (blocks, steps of 64 inputs, 4 inputs each, 16 outputs by 4)
  alignas(64) int32_t sums[2][2][kTileMost][kBlock];   // (sets, tiles)
  alignas(64) float y[kMostRows * kPair];
  __m512i zero[2];
  __m512 scale[2];
  Job jobs[4];     // the latest ones, job j at j % 4; its sums are in set j % 2
  int64_t pushed;  // so many so far
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0..3 are sums (two a set), 4 and 5 activations, 6 and 7 codes.
void configure(int rows, int run) {
  const int inputs = run < 64 ? run : 64;
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : inputs / 4);
    config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? inputs : 64);
  }
  _tile_loadconfig(&config);
}

template <int BITS>
void unpack_signed(const BelleWeight& w, int64_t pair, int64_t group, Workspace& to) {
  constexpr int kS = 8 / BITS;
  const int vectors = w.run * BITS / 32;
  for (int b = 0; b < 2; ++b) {
    const int64_t block = 2 * pair + b;
    const Grid grid = load_grid(w, block, group);
    to.scale[b] = grid.scale[0];
    __m512i offset;
    if constexpr (BITS == 8) {  // with its highest bit turned, a code is code - 128, signed
      offset = _mm512_set1_epi8(-128);
      to.zero[b] = _mm512_sub_epi32(grid.zero[0], _mm512_set1_epi32(128));
    } else {
      offset = _mm512_mullo_epi32(grid.zero[0], _mm512_set1_epi32(0x01010101));
    }
    const uint8_t* codes = w.codes + (block * w.groups + group) * vectors * 64;
    int8_t* out = &to.codes[b][0][0][0];
    for (int v = 0; v < vectors; ++v) {
      const __m512i packed = _mm512_loadu_si512(codes + v * 64);
      each<kS>([&](auto s) {
        _mm512_store_si512(out + (v * kS + s.value) * 64,
                           _mm512_sub_epi8(slice<BITS, decltype(s)::value>(packed), offset));
      });
    }
  }
}

// Scale `count` rows of sums and add them to y; LACK: the codes lack a zero.
template <int PARTS, bool LACK>
inline __attribute__((always_inline)) void scale_rows(const Task& t, const Job& job, const int32_t (*high)[kBlock],
                                                      const int32_t (*low)[kBlock], int first, int count) {
  const __m512 scale = job.scale;
  const float* row_scale = t.scale + job.place + first;
  const int32_t* sum = t.sum + job.place + first;
  float* y = job.y + first * kPair;
#pragma GCC unroll 16
  for (int r = 0; r < count; ++r) {
    __m512i whole = _mm512_load_si512(high[r]);
    if constexpr (PARTS == 2) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), _mm512_load_si512(low[r]));
    if constexpr (LACK) whole = _mm512_sub_epi32(whole, _mm512_mullo_epi32(job.zero, _mm512_set1_epi32(sum[r])));
    const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale);
    float* to = y + r * kPair;
    _mm512_store_ps(to, _mm512_fmadd_ps(value, _mm512_set1_ps(row_scale[r]), _mm512_load_ps(to)));
  }
}

template <int PARTS, bool LACK>
inline void scale_job(const Task& t, const Workspace& s, int64_t index, int tile_rows) {
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
inline void push(const Task& t, Workspace& s, const uint8_t* first, const uint8_t* second, const Job& job,
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
inline void flush(const Task& t, Workspace& s, int tile_rows) {
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

template <int BITS, int PARTS, bool LACK>
void tile_pair(const Task& t, int64_t row_begin, int64_t rows, int tile_rows, int64_t pair, Workspace& s) {
  const int run = t.w.run, step = PARTS == 2 ? tile_rows : 2 * tile_rows;
  std::memset(s.y, 0, sizeof(float) * static_cast<size_t>(rows) * kPair);
  for (int64_t g = 0; g < t.w.groups; ++g) {
    unpack_signed<BITS>(t.w, pair, g, s);
    const int64_t place = place_of(t, row_begin) + g * t.unit_rows;
    const uint8_t* first = t.data[0] + place * run;
    const uint8_t* second = PARTS == 2 ? t.data[1] + place * run : first + tile_rows * run;
    for (int64_t strip = 0; strip < rows; strip += kStrip / step * step) {
      const int64_t end = least(rows, strip + kStrip / step * step);
      for (int b = 0; b < 2; ++b) {
        _tile_loadd(6, s.codes[b][0], 64);
        if (run > 64) _tile_loadd(7, s.codes[b][1], 64);
        for (int64_t m = strip; m < end; m += step) {
          const Job job{place + m, rows - m, s.y + m * kPair + b * kBlock, s.scale[b], s.zero[b]};
          if (s.pushed & 1) {
            push<PARTS, LACK, 1>(t, s, first + m * run, second + m * run, job, tile_rows);
          } else {
            push<PARTS, LACK, 0>(t, s, first + m * run, second + m * run, job, tile_rows);
          }
        }
      }
    }
  }
  flush<PARTS, LACK>(t, s, tile_rows);
  for (int64_t m = 0; m < rows; ++m)
    for (int b = 0; b < 2; ++b)
      if ((2 * pair + b) * kBlock < t.w.outputs)
        write_block(t, row_begin + m, 2 * pair + b, s.y + m * kPair + b * kBlock);
}

template <int BITS, int PARTS>
void tile_pairs(const Task& t, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end) {
  // Tiles of equal height: 17 rows are two tiles of 9, not one of 16 and one that is nearly empty.
  const int64_t rows = row_end - row_begin, unit = PARTS == 2 ? kTileMost : 2 * kTileMost;
  const int64_t count = (rows + unit - 1) / unit * (unit / kTileMost);
  const int tile_rows = static_cast<int>((rows + count - 1) / count);
  const bool lack = BITS == 8 && (t.w.zeros != nullptr || t.w.zero != 128);
  Workspace s;
  s.pushed = 0;
  configure(tile_rows, t.w.run);
  for (int64_t pair = pair_begin; pair < pair_end; ++pair) {
    if (lack) {
      tile_pair<BITS, PARTS, BITS == 8>(t, row_begin, rows, tile_rows, pair, s);
    } else {
      tile_pair<BITS, PARTS, false>(t, row_begin, rows, tile_rows, pair, s);
    }
  }
  _tile_release();
}

template <int BITS>
void tile_bits(const Task& t, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end) {
  if (t.parts == 2) {
    tile_pairs<BITS, 2>(t, row_begin, row_end, pair_begin, pair_end);
  } else {
    tile_pairs<BITS, 1>(t, row_begin, row_end, pair_begin, pair_end);
  }
}

void multiply_amx(const Task& t, int64_t row_begin, int64_t row_end, int64_t pair_begin, int64_t pair_end) {
  if (row_end - row_begin <= kStreamRows) return multiply(t, row_begin, row_end, pair_begin, pair_end);
  switch (t.w.bits) {
    case 2: return tile_bits<2>(t, row_begin, row_end, pair_begin, pair_end);
    case 4: return tile_bits<4>(t, row_begin, row_end, pair_begin, pair_end);
    default: return tile_bits<8>(t, row_begin, row_end, pair_begin, pair_end);
  }
}

}  // namespace
}  // namespace belle

const belle::Kernel belle::kAmx = {1, split, multiply_amx, read};

bool belle::amx_usable() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
