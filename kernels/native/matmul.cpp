// Products and plain reads: which instruction set, how the work is cut, and the checks that only native code makes fast.
#include "native.h"

#include <cstdlib>

namespace belle {

namespace {

constexpr int64_t kCacheBytes = 1 << 20;     // of split activations that a unit of work meets: half of a level 2 cache
constexpr int64_t kSingleThreadProducts = 1 << 20;  // below, waking threads takes longer than the work
constexpr int64_t kSingleThreadSplit = 1 << 17;     // activations split by one thread: 50 microseconds, but one barrier less

constexpr int64_t kSplitRows = 4;             // split by one thread at a time

struct MatmulPlan {
  MatmulTask task;
  const IsaKernels* kernels;
  int64_t pairs, row_units, unit_pairs;  // units of work: rows (task.unit_rows) by pairs of blocks (unit_pairs)
};

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void split_rows(const MatmulPlan& plan, int threads) {
  parallel_for(threads, plan.task.rows, kSplitRows,
        [&](int64_t row, int64_t end, int) { plan.kernels->split(plan.task, row, end); });
}

// The places of pairs by units of rows, one after the other.
void multiply_units(const MatmulPlan& plan, int threads) {
  const int64_t rows = plan.task.unit_rows;
  parallel_for(threads, plan.pairs * plan.row_units, plan.unit_pairs, [&](int64_t at, int64_t end, int) {
    while (at < end) {
      const int64_t row = at / plan.pairs * rows, pair = at % plan.pairs, left = plan.pairs - pair;
      const int64_t pairs = end - at < left ? end - at : left;
      plan.kernels->multiply(plan.task, row, row + rows < plan.task.rows ? row + rows : plan.task.rows, pair, pair + pairs);
      at += pairs;
    }
  });
}

// Rows in equal portions whose activations stay in a thread's cache; outputs in portions that keep all threads busy. Few
// rows are bound by memory, whichever the portions.
void cut(MatmulPlan& plan, int threads) {
  MatmulTask& t = plan.task;
  const int64_t all = t.w.groups * t.w.run, chunk = plan.kernels->chunk_inputs;
  const int64_t row_bytes = (chunk > 0 && chunk < all ? chunk : all) * (plan.kernels->input_bytes == 2 ? 2 : t.parts);
  int64_t most = kCacheBytes / row_bytes / 32 * 32;
  most = most < 32 ? 32 : most > kMaxRows ? kMaxRows : most;
  plan.row_units = divided_up(t.rows, most);
  t.unit_rows = divided_up(t.rows, plan.row_units);
  plan.row_units = divided_up(t.rows, t.unit_rows);
  plan.pairs = divided_up(t.w.outputs, kPair);
  plan.unit_pairs = t.rows <= kMaxStreamRows ? 1 : divided_up(plan.pairs * plan.row_units, 8 * threads);
}

bool order_fits(const WeightStruct& w) {
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

// out (M, N) = x (M, K) times the weight, plus its bias, plus `addend` where it is not null. 0, or 1 where an input of `order`
// is out of bounds, 2 without memory. The caller has checked every size.
int belle::run_product(const CallStruct& call, int threads, int isa) {
  const WeightStruct& weight = *static_cast<const WeightStruct*>(call.operand);
  const int64_t rows = call.rows;
  if (rows == 0) return 0;
  if (!order_fits(weight)) return 1;
  const IsaKernels* chosen = kernels_for(isa);
  MatmulPlan plan{{weight, call.x, call.addend, call.out, rows, 0, call.parts, {}, nullptr, nullptr}, chosen, 0, 0, 0};
  if (rows * weight.inputs * weight.outputs < kSingleThreadProducts) threads = 1;
  cut(plan, threads);
  const int64_t places = plan.row_units * plan.task.unit_rows * weight.groups;
  const size_t part = static_cast<size_t>((places + kOverreadRows) * weight.run * chosen->input_bytes + 63) / 64 * 64;
  Buffer data(2 * part), numbers(static_cast<size_t>(places) * 8);
  if (data.at == nullptr || numbers.at == nullptr) return 2;
  plan.task.split[0] = data.at;
  plan.task.split[1] = data.at + part;
  plan.task.scale = reinterpret_cast<float*>(numbers.at);
  plan.task.sum = reinterpret_cast<int32_t*>(numbers.at + places * 4);
  split_rows(plan, rows * weight.inputs < kSingleThreadSplit ? 1 : threads);
  multiply_units(plan, threads);
  return 0;
}

// Read whole portions of 256 KiB and do nothing else; the sum of their words of 4 bytes, so that nothing is left out.
BELLE_API uint32_t belle_read(const uint8_t* bytes, int64_t size, int threads, int isa) {
  constexpr int64_t kPortion = 1 << 18;
  const belle::IsaKernels* kernels = belle::kernels_for(isa);
  std::atomic<uint32_t> sum{0};
  belle::parallel_for(threads, size / kPortion, 1, [&](int64_t at, int64_t end, int) {
    sum += kernels->read(bytes + at * kPortion, (end - at) * kPortion);
  });
  return sum;
}
