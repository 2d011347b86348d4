// Attention of one decode step: a unit of work is one head of one row.
#include "native.h"

#include <cstdlib>

// Also returns 1 if a slot occurs twice. The caller has checked all sizes.
int belle::run_attention(const AttentionStruct& a, int threads, int isa) {
  const KvCacheStruct& c = *a.cache;
  const DecodeStepStruct& s = *a.step;
  int64_t longest = 0, values = 0;
  for (int64_t row = 0; row < s.rows; ++row) {
    const int64_t length = s.lengths[row];
    if (s.slots[row] < 0 || s.slots[row] >= c.slots || length < 0 || length >= c.capacity) return 1;
    for (int64_t other = 0; other < row; ++other) {
      if (s.slots[other] == s.slots[row]) return 1;  // two threads would write the same place
    }
    longest = length + 1 > longest ? length + 1 : longest;
    values += (length + 1) * c.kv_heads * c.head_dim;
  }
  if (values < kSingleThreadValues) threads = 1;
  const int64_t size = (a.heads / c.kv_heads * (c.head_dim + longest) + c.head_dim + 15) / 16 * 16;  // per thread
  auto* scratch = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(threads * size) * sizeof(float)));
  if (scratch == nullptr) return 2;
  const IsaKernels* kernels = kernels_for(isa);
  parallel_for(threads, s.rows * c.kv_heads, 1, [&](int64_t unit, int64_t end, int thread) {
    for (; unit < end; ++unit) kernels->attend(a, unit / c.kv_heads, unit % c.kv_heads, scratch + thread * size);
  });
  std::free(scratch);
  return 0;
}
