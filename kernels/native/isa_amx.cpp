// AMX: tiles of 16 rows by 64 bytes. Few rows take the VNNI code, whose results are the same to the bit: sums of
// integers are exact, and the same operations scale and add them in the same order.
//
// A group's codes of 32 outputs, minus their zeros, are two columns of tiles of 16 outputs by 64 inputs, in just the
// order in which they lie in memory. Two tiles of activations meet them at a time, which makes four tiles of sums: the
// two parts of the same rows, or two tiles of rows. While the tile unit multiplies, the vector units scale the sums of
// the tiles before.
#include "avx512vnni.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace belle {
namespace {

constexpr int kTileMost = 16;  // rows of a tile

struct Workspace {
  alignas(64) int8_t codes[2][kMostRun / 64][16][64];  // (blocks, steps of 64 inputs, 4 inputs each, 16 outputs by 4)
  alignas(64) int32_t sums[2][4][kTileMost][kBlock];   // two sets: one is filled while the other is scaled
  alignas(64) float y[(kMostRows + kTileMost) * kPair];
  __m512i zero[2];   // that the codes still lack: of 8 bits only, whose difference to a zero has 9
  __m512 scale[2];
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0..3 are sums, 4 and 5 activations, 6 and 7 codes.
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
inline void scale_rows(const Task& t, const Workspace& from, const int32_t (*high)[kBlock],
                       const int32_t (*low)[kBlock], int b, int64_t place, int64_t count, float* y) {
  for (int64_t r = 0; r < count; ++r) {
    __m512i whole = _mm512_load_si512(high[r]);
    if constexpr (PARTS == 2) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), _mm512_load_si512(low[r]));
    if constexpr (LACK)
      whole = _mm512_sub_epi32(whole, _mm512_mullo_epi32(from.zero[b], _mm512_set1_epi32(t.sum[place + r])));
    float* to = y + r * kPair + b * kBlock;
    const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), from.scale[b]);
    _mm512_store_ps(to, _mm512_fmadd_ps(value, _mm512_set1_ps(t.scale[place + r]), _mm512_load_ps(to)));
  }
}

// A set of four tiles of sums that waits to be scaled.
struct Pending {
  int set;
  int64_t group, m;
};

// Scale one quarter of a set. With two parts, sums are (block, part), and a quarter is half of a block's rows; with one,
// they are (block, tile of rows), and a quarter is one of them.
template <int PARTS, bool LACK>
inline void scale_quarter(const Task& t, Workspace& s, const Pending& p, int quarter, int64_t row_begin, int64_t rows,
                          int tile_rows) {
  const int b = quarter / 2, second = quarter % 2;
  const auto* sums = s.sums[p.set] + 2 * b;
  const int64_t place = p.group * t.rows + row_begin;
  if constexpr (PARTS == 2) {
    const int first = second * (kTileMost / 2);
    const int64_t count = least(least(tile_rows, rows - p.m) - first, kTileMost / 2), m = p.m + first;
    scale_rows<2, LACK>(t, s, sums[0] + first, sums[1] + first, b, place + m, count, s.y + m * kPair);
  } else {
    const int64_t m = p.m + second * tile_rows;
    scale_rows<1, LACK>(t, s, sums[second], nullptr, b, place + m, least(tile_rows, rows - m), s.y + m * kPair);
  }
}

// 64 inputs of two tiles of activations by two columns of codes.
inline void multiply_step(const uint8_t* first, const uint8_t* second, int run, const Workspace& s, int step) {
  _tile_loadd(4, first + step * 64, run);
  _tile_loadd(6, s.codes[0][step], 64);
  _tile_dpbssd(0, 4, 6);
  _tile_loadd(5, second + step * 64, run);
  _tile_dpbssd(1, 5, 6);
  _tile_loadd(7, s.codes[1][step], 64);
  _tile_dpbssd(2, 4, 7);
  _tile_dpbssd(3, 5, 7);
}

template <int BITS, int PARTS, bool LACK>
void tile_pair(const Task& t, int64_t row_begin, int64_t rows, int tile_rows, int64_t pair, Workspace& s) {
  const int run = t.w.run, step = PARTS == 2 ? tile_rows : 2 * tile_rows;
  std::memset(s.y, 0, sizeof(float) * static_cast<size_t>(rows) * kPair);
  for (int64_t g = 0; g < t.w.groups; ++g) {
    unpack_signed<BITS>(t.w, pair, g, s);
    const uint8_t* high = t.data[0] + (g * t.rows + row_begin) * run;
    const uint8_t* second = PARTS == 2 ? t.data[1] + (g * t.rows + row_begin) * run : high + tile_rows * run;
    Pending before{0, g, -1};
    // In this order, one tile's products run while the sums of the tile before are scaled: the processor looks ahead by
    // some hundred instructions only.
    auto scale = [&](int quarter) {
      if (before.m >= 0) scale_quarter<PARTS, LACK>(t, s, before, quarter, row_begin, rows, tile_rows);
    };
    for (int64_t m = 0; m < rows; m += step) {
      const int set = before.set ^ 1;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      multiply_step(high + m * run, second + m * run, run, s, 0);
      scale(0);
      if (run > 64) multiply_step(high + m * run, second + m * run, run, s, 1);
      scale(1);
      _tile_stored(0, s.sums[set][0], 64);
      _tile_stored(1, s.sums[set][1], 64);
      scale(2);
      _tile_stored(2, s.sums[set][2], 64);
      _tile_stored(3, s.sums[set][3], 64);
      scale(3);
      before = {set, g, m};
    }
    for (int quarter = 0; quarter < 4; ++quarter) scale(quarter);
  }
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

const belle::Kernel belle::kAmx = {1, split, multiply_amx};

bool belle::amx_usable() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
