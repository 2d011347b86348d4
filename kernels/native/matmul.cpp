// Matrix products: how the work is divided among threads, and the checks of indices, which only native code makes fast.
#include "native.h"

#include <unistd.h>

#include <cstdlib>

namespace belle {
namespace {

constexpr int64_t kMinCacheBytes = 1 << 20, kMaxCacheBytes = 8 << 20;
constexpr int64_t kSingleThreadProducts = 1 << 20;  // with fewer, waking threads takes longer than the work
constexpr int64_t kSingleThreadSplit = 1 << 17;  // splitting fewer activations takes 50 us, and threads need a barrier
constexpr int64_t kSplitRows = 4;                // split by one thread at a time

struct MatmulPlan {
  MatmulTask task;
  const IsaKernels* kernels;
  int64_t pairs, row_units, unit_pairs;  // a unit of work is task.unit_rows rows by unit_pairs pairs of blocks
};

// Split activations per unit of work: a quarter of the third-level cache, as far as the system tells its size, since the
// threads multiply the same activations by different outputs. 1 MiB left 32 rows of 11008 inputs.
int64_t cache_bytes() {
  static const int64_t bytes = [] {
    const int64_t quarter = sysconf(_SC_LEVEL3_CACHE_SIZE) / 4;
    return quarter < kMinCacheBytes ? kMinCacheBytes : quarter > kMaxCacheBytes ? kMaxCacheBytes : quarter;
  }();
  return bytes;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void split_rows(const MatmulPlan& plan, int threads) {
  parallel_for(threads, plan.task.rows, kSplitRows,
               [&](int64_t row, int64_t end, int) { plan.kernels->split(plan.task, row, end); });
}

// Work items are numbered row unit by row unit, pair by pair within one.
void multiply_units(const MatmulPlan& plan, int threads) {
  const int64_t rows = plan.task.unit_rows;
  parallel_for(threads, plan.pairs * plan.row_units, plan.unit_pairs, [&](int64_t at, int64_t end, int) {
    while (at < end) {
      const int64_t row = at / plan.pairs * rows, pair = at % plan.pairs, left = plan.pairs - pair;
      const int64_t pairs = end - at < left ? end - at : left;
      const int64_t row_end = row + rows < plan.task.rows ? row + rows : plan.task.rows;
      plan.kernels->multiply(plan.task, row, row_end, pair, pair + pairs);
      at += pairs;
    }
  });
}

// Divide rows into equal units whose activations stay in a thread's cache, and outputs into units that keep all threads
// busy. Few rows are limited by memory bandwidth, so that the size of their units does not matter.
void divide_work(MatmulPlan& plan, int threads) {
  MatmulTask& t = plan.task;
  const int64_t all = t.w.groups * t.w.run, chunk = plan.kernels->chunk_inputs;
  const int64_t row_bytes = (chunk > 0 && chunk < all ? chunk : all) * (plan.kernels->input_bytes == 2 ? 2 : t.parts);
  int64_t max_rows = cache_bytes() / row_bytes / 32 * 32;
  max_rows = max_rows < 32 ? 32 : max_rows > kMaxRows ? kMaxRows : max_rows;
  plan.row_units = divide_up(t.rows, max_rows);
  t.unit_rows = divide_up(t.rows, plan.row_units);
  plan.row_units = divide_up(t.rows, t.unit_rows);
  plan.pairs = divide_up(t.w.outputs, kPair);
  plan.unit_pairs = t.rows <= plan.kernels->stream_rows ? 1 : divide_up(plan.pairs * plan.row_units, 8 * threads);
}

bool order_is_valid(const WeightStruct& w) {
  if (w.order == nullptr) return w.inputs <= w.groups * w.run;
  int32_t lowest = 0, highest = -1;
  for (int64_t i = 0; i < w.groups * w.run; ++i) {
    lowest = w.order[i] < lowest ? w.order[i] : lowest;
    highest = w.order[i] > highest ? w.order[i] : highest;
  }
  return lowest >= -1 && highest < w.inputs;
}

struct Buffer {
  explicit Buffer(size_t bytes) : at(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {}
  ~Buffer() { std::free(at); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint8_t* at;
};

}  // namespace
}  // namespace belle

// out (M, N) = x (M, K) times the weight, plus its bias, plus `addend` if not null. The caller has checked all sizes.
int belle::run_product(const CallStruct& call, int threads, int isa) {
  const WeightStruct& weight = *static_cast<const WeightStruct*>(call.operand);
  const int64_t rows = call.rows;
  if (rows == 0) return 0;
  if (!order_is_valid(weight)) return 1;
  const IsaKernels* kernels = kernels_for(isa);
  MatmulPlan plan{{weight, call.x, call.addend, call.out, rows, 0, call.parts, {}, nullptr, nullptr}, kernels, 0, 0, 0};
  if (rows * weight.inputs * weight.outputs < kSingleThreadProducts) threads = 1;
  divide_work(plan, threads);
  const int64_t positions = plan.row_units * plan.task.unit_rows * weight.groups;
  const int64_t split_bytes = (positions + kOverreadRows) * weight.run * kernels->input_bytes;
  const size_t part = static_cast<size_t>(split_bytes + 63) / 64 * 64;
  Buffer split(2 * part), scales_and_sums(static_cast<size_t>(positions) * 8);
  if (split.at == nullptr || scales_and_sums.at == nullptr) return 2;
  plan.task.split[0] = split.at;
  plan.task.split[1] = split.at + part;
  plan.task.scale = reinterpret_cast<float*>(scales_and_sums.at);
  plan.task.sum = reinterpret_cast<int32_t*>(scales_and_sums.at + positions * 4);
  split_rows(plan, rows * weight.inputs < kSingleThreadSplit ? 1 : threads);
  multiply_units(plan, threads);
  return 0;
}

// Read whole pieces of 256 KiB and return the sum of their 4-byte words, so that no read can be optimized away.
BELLE_API uint32_t belle_read(const uint8_t* bytes, int64_t size, int threads, int isa) {
  constexpr int64_t kPiece = 1 << 18;
  const belle::IsaKernels* kernels = belle::kernels_for(isa);
  std::atomic<uint32_t> sum{0};
  belle::parallel_for(threads, size / kPiece, 1, [&](int64_t at, int64_t end, int) {
    sum += kernels->read(bytes + at * kPiece, (end - at) * kPiece);
  });
  return sum;
}
