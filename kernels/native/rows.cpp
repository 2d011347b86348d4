// The rows of a matrix such as an embedding: rounded, and laid out as native.h says.
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

void lay_block(const BelleRows& r, int64_t block, uint8_t* out) {
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

void lay_blocks(void* context) {
  RowsTask& task = *static_cast<RowsTask*>(context);
  const int64_t blocks = task.r.count / kBlock;
  const int64_t unit = pieces_of_page(task.r.groups * task.r.run * task.r.bits / 8 * kBlock);
  for (int64_t block; (block = unit * task.next++) < blocks;) {
    const int64_t end = block + unit < blocks ? block + unit : blocks;
    for (; block < end; ++block) lay_block(task.r, block, task.out);
  }
}

constexpr int64_t kRowsAtATime = 8;

struct RoundingTask {
  const BelleRounding& r;
  const Kernel* kernel;
  std::atomic<int64_t> next{0};
  std::atomic<bool> finite{true};
};

void round_rows(void* context) {
  RoundingTask& task = *static_cast<RoundingTask*>(context);
  for (int64_t row; (row = kRowsAtATime * task.next++) < task.r.count && task.finite;) {
    const int64_t end = row + kRowsAtATime < task.r.count ? row + kRowsAtATime : task.r.count;
    for (; row < end; ++row) {
      if (!task.kernel->round_row(task.r, row)) task.finite = false;
    }
  }
}

}  // namespace
}  // namespace belle

// 0, or 1 where there is NaN or infinity. The caller has checked shapes.
BELLE_API int belle_round_rows(const BelleRounding* rounding, int threads, int isa) {
  belle::RoundingTask task{*rounding, belle::kernel(isa), {}, {true}};
  belle::parallel(threads, belle::round_rows, &task);
  return task.finite ? 0 : 1;
}

// Fill `out` (N / 16, G, run * bits / 32, 64); the caller has checked shapes.
BELLE_API void belle_pack_rows(const BelleRows* rows, uint8_t* out, int threads) {
  belle::RowsTask task{*rows, out, {}};
  belle::parallel(threads, belle::lay_blocks, &task);
}
