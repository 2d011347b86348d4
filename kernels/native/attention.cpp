// The entry point of attention: heads of rows as units of work, each of which one thread computes whole.
#include "native.h"

#include <atomic>
#include <cstdlib>

namespace {

constexpr int64_t kInlineNumbers = 1 << 16;  // of keys: below, waking threads takes longer than the work

struct Plan {
  const BelleAttention& a;
  const belle::Kernel* kernel;
  float* scratch;
  int64_t scratch_size;  // of one thread, in floats
  std::atomic<int64_t> next{0}, thread{0};
};

void attend_units(void* context) {
  Plan& plan = *static_cast<Plan*>(context);
  float* scratch = plan.scratch + plan.thread++ * plan.scratch_size;
  for (int64_t unit; (unit = plan.next++) < plan.a.rows * plan.a.kv_heads;) {
    plan.kernel->attend(plan.a, unit / plan.a.kv_heads, unit % plan.a.kv_heads, scratch);
  }
}

}  // namespace

// 0, or 1 where a slot or a length is out of bounds, 2 without memory. The caller has checked every size.
BELLE_API int belle_attend(const BelleAttention* attention, int threads, int isa) {
  const BelleAttention& a = *attention;
  int64_t longest = 0, numbers = 0;
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t length = a.lengths[row];
    if (a.slots[row] < 0 || a.slots[row] >= a.slot_count || length < 1 || length > a.capacity) return 1;
    longest = length > longest ? length : longest;
    numbers += length * a.kv_heads * a.head_dim;
  }
  if (numbers < kInlineNumbers) threads = 1;
  const int64_t size = (a.heads / a.kv_heads * (a.head_dim + longest) + 15) / 16 * 16;
  auto* scratch = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(threads * size) * sizeof(float)));
  if (scratch == nullptr) return 2;
  Plan plan{a, belle::kernel(isa), scratch, size, {}, {}};
  belle::parallel(threads, attend_units, &plan);
  std::free(scratch);
  return 0;
}
