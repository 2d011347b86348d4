// The entry point of packing: strips of outputs are units of work.
#include "native.h"

// Fill `out` (padded N / 16, G, run * container / 32, 64), which begins a line of the cache; the caller has checked shapes
// and `order`.
BELLE_API void belle_pack(const BelleWords* words, uint8_t* out, int threads, int isa) {
  const BelleWords& w = *words;
  const belle::Kernel* kernel = belle::kernel(isa);
  const int64_t strips = (w.outputs + belle::kPacked - 1) / belle::kPacked;
  const int64_t unit = belle::pieces_of_page(w.groups * w.run * w.container / 8 * belle::kPacked);
  belle::share(threads, strips, unit, [&](int64_t strip, int64_t end, int) {
    for (; strip < end; ++strip) kernel->pack(w, strip, out);
  });
}
