// The entry point of packing: strips of outputs are units of work.
#include "native.h"

#include <atomic>

namespace {

struct PackTask {
  const BelleWords& words;
  const belle::Kernel* kernel;
  uint8_t* out;
  std::atomic<int64_t> next{0};
};

void pack_strips(void* context) {
  PackTask& task = *static_cast<PackTask*>(context);
  const BelleWords& w = task.words;
  const int64_t strips = (w.outputs + belle::kPacked - 1) / belle::kPacked;
  const int64_t unit = belle::pieces_of_page(w.groups * w.run * w.container / 8 * belle::kPacked);
  for (int64_t strip; (strip = unit * task.next++) < strips;) {
    const int64_t end = strip + unit < strips ? strip + unit : strips;
    for (; strip < end; ++strip) task.kernel->pack(w, strip, task.out);
  }
}

}  // namespace

// Fill `out` (padded N / 16, G, run * container / 32, 64), which begins a line of the cache; the caller has checked shapes
// and `order`.
BELLE_API void belle_pack(const BelleWords* words, uint8_t* out, int threads, int isa) {
  PackTask task{*words, belle::kernel(isa), out, {}};
  belle::parallel(threads, pack_strips, &task);
}
