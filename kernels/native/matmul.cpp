// The entry points: which instruction set, how the work is cut, and the checks that only native code can make fast.
#include "cpu_features.h"
#include "native.h"

#include <atomic>
#include <cstdlib>

namespace belle {

// Sets whose compiler flags this compiler does not know are left out of the build.
#ifndef BELLE_ISAS
#define BELLE_ISAS 1
#endif

const Kernel* kernel(int isa) {
  switch (isa) {
#if BELLE_ISAS & 2
    case kIsaAvx2: return &kAvx2;
#endif
#if BELLE_ISAS & 4
    case kIsaAvxVnni: return &kAvxVnni;
#endif
#if BELLE_ISAS & 8
    case kIsaAvx512: return &kAvx512;
#endif
#if BELLE_ISAS & 16
    case kIsaAvx512Vnni: return &kAvx512Vnni;
#endif
#if BELLE_ISAS & 32
    case kIsaAmx: return &kAmx;
#endif
    default: return &kPortable;
  }
}

namespace {

constexpr unsigned kBuilt = BELLE_ISAS;  // bit i: instruction set i

bool usable(int isa) {
#if BELLE_ISAS & 32
  if (isa == kIsaAmx) return supported(isa) && amx_usable();
#endif
  return (kBuilt >> isa & 1) && supported(isa);
}

constexpr int64_t kCacheBytes = 1 << 20;     // of split activations that a unit of work meets: half of a level 2 cache
constexpr int64_t kInlineProducts = 1 << 20;  // below, waking threads takes longer than the work
constexpr int64_t kSplitInline = 1 << 17;     // activations split by one thread: 50 microseconds, but one barrier less

struct Plan {
  Task task;
  const Kernel* kernel;
  int64_t pairs, row_units, unit_pairs;  // units of work: rows (task.unit_rows) by pairs of blocks (unit_pairs)
  std::atomic<int64_t> next{0};
};

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void split_rows(void* context) {
  Plan& plan = *static_cast<Plan*>(context);
  constexpr int64_t kRows = 4;
  for (int64_t row; (row = kRows * plan.next++) < plan.task.rows;)
    plan.kernel->split(plan.task, row, row + kRows < plan.task.rows ? row + kRows : plan.task.rows);
}

void multiply_units(void* context) {
  Plan& plan = *static_cast<Plan*>(context);
  const int64_t columns = divided_up(plan.pairs, plan.unit_pairs);
  for (int64_t unit; (unit = plan.next++) < plan.row_units * columns;) {
    const int64_t rows = plan.task.unit_rows, row = unit / columns * rows, pair = unit % columns * plan.unit_pairs;
    const int64_t row_end = row + rows < plan.task.rows ? row + rows : plan.task.rows;
    const int64_t pair_end = pair + plan.unit_pairs < plan.pairs ? pair + plan.unit_pairs : plan.pairs;
    plan.kernel->multiply(plan.task, row, row_end, pair, pair_end);
  }
}

// Rows in equal portions whose activations stay in a thread's cache; outputs in portions that keep all threads busy.
void cut(Plan& plan, int threads) {
  Task& t = plan.task;
  const int64_t all = t.w.groups * t.w.run, chunk = plan.kernel->chunk;
  const int64_t row_bytes = (chunk > 0 && chunk < all ? chunk : all) * (plan.kernel->input_bytes == 2 ? 2 : t.parts);
  int64_t most = kCacheBytes / row_bytes / 32 * 32;
  most = most < 32 ? 32 : most > kMostRows ? kMostRows : most;
  plan.row_units = divided_up(t.rows, most);
  t.unit_rows = divided_up(t.rows, plan.row_units);
  plan.row_units = divided_up(t.rows, t.unit_rows);
  plan.pairs = divided_up(t.w.outputs, kPair);
  plan.unit_pairs = divided_up(plan.pairs * plan.row_units, 8 * threads);
}

bool order_fits(const BelleWeight& w) {
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

BELLE_API int belle_abi() { return belle::kAbi; }

// 1 where instruction set `isa` (the numbers of cpu_features.h) was built in and runs here.
BELLE_API int belle_usable(int isa) { return isa >= 0 && isa < belle::kIsaCount && belle::usable(isa); }

namespace {

enum Outcome { kOk = 0, kBadOrder = 1, kNoMemory = 2 };

}  // namespace

// y (M, N) = x (M, K) times the weight, plus the bias. `parts`: 2 exact, 1 fast. The caller has checked every size.
BELLE_API int belle_matmul(const BelleWeight* weight, const float* x, int64_t rows, int parts, float* y, int threads,
                           int isa) {
  using namespace belle;
  if (rows == 0) return kOk;
  if (!order_fits(*weight)) return kBadOrder;
  const Kernel* chosen = kernel(isa);
  Plan plan{{*weight, x, y, rows, 0, parts, {}, nullptr, nullptr}, chosen, 0, 0, 0, {}};
  if (rows * weight->inputs * weight->outputs < kInlineProducts) threads = 1;
  cut(plan, threads);
  const int64_t places = plan.row_units * plan.task.unit_rows * weight->groups;
  const size_t part = static_cast<size_t>((places + kOverhang) * weight->run * chosen->input_bytes + 63) / 64 * 64;
  Buffer data(2 * part), numbers(static_cast<size_t>(places) * 8);
  if (data.at == nullptr || numbers.at == nullptr) return kNoMemory;
  plan.task.data[0] = data.at;
  plan.task.data[1] = data.at + part;
  plan.task.scale = reinterpret_cast<float*>(numbers.at);
  plan.task.sum = reinterpret_cast<int32_t*>(numbers.at + places * 4);
  parallel(rows * weight->inputs < kSplitInline ? 1 : threads, split_rows, &plan);
  plan.next = 0;
  parallel(threads, multiply_units, &plan);
  return kOk;
}

namespace {

struct ReadTask {
  const uint8_t* bytes;
  int64_t portions;
  const belle::Kernel* kernel;
  std::atomic<int64_t> next{0};
  std::atomic<uint32_t> sum{0};
};

constexpr int64_t kPortion = 1 << 18;

void read_portions(void* context) {
  ReadTask& task = *static_cast<ReadTask*>(context);
  for (int64_t i; (i = task.next++) < task.portions;) task.sum += task.kernel->read(task.bytes + i * kPortion, kPortion);
}

}  // namespace

// Read whole portions of 256 KiB and do nothing else; the sum of their words of 4 bytes, so that nothing is left out.
BELLE_API uint32_t belle_read(const uint8_t* bytes, int64_t size, int threads, int isa) {
  ReadTask task{bytes, size / kPortion, belle::kernel(isa), {}, {}};
  belle::parallel(threads, read_portions, &task);
  return task.sum;
}
