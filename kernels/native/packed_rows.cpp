// Rows of a matrix such as an embedding: rounded to codes, and converted to the layout of native.h.
#include "native.h"

#include <cstring>

namespace belle {
namespace {

constexpr int64_t kRowsPerPiece = 8;

void pack_block(const CodeRowsStruct& r, int64_t block, uint8_t* out) {
  const int fields = 8 / r.bits, vectors = r.run * r.bits / 32;
  out += block * r.groups * vectors * 64;
  for (int64_t g = 0; g < r.groups; ++g, out += vectors * 64) {
    for (int lane = 0; lane < kBlock; ++lane) {
      const int64_t row = block * kBlock + lane, at = (row * r.groups + g) * r.run;
      const uint8_t* codes = r.matrix + at;
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

}  // namespace
}  // namespace belle

// Return 0, or 1 if the matrix holds NaN or infinity. The caller has checked the shapes.
BELLE_API int belle_round_rows(const RowQuantizationStruct* rounding, int threads, int isa) {
  const belle::IsaKernels* kernels = belle::kernels_for(isa);
  std::atomic<bool> finite{true};
  belle::parallel_for(threads, rounding->count, belle::kRowsPerPiece, [&](int64_t row, int64_t end, int) {
    for (; row < end && finite; ++row) {
      if (!kernels->quantize_row(*rounding, row)) finite = false;
    }
  });
  return finite ? 0 : 1;
}

// Write the layout to `out` (N / 16, G, run * bits / 32, 64). The caller has checked the shapes.
BELLE_API void belle_pack_rows(const CodeRowsStruct* rows, uint8_t* out, int threads) {
  const int64_t unit = belle::pieces_per_huge_page(rows->groups * rows->run * rows->bits / 8 * belle::kBlock);
  belle::parallel_for(threads, rows->count / belle::kBlock, unit, [&](int64_t block, int64_t end, int) {
    for (; block < end; ++block) belle::pack_block(*rows, block, out);
  });
}
