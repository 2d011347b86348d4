// The entry point of packing: a unit of work is a strip of outputs.
#include "native.h"

// Write the layout of native.h to `out` (padded N / 16, G, run * container / 32, 64), which is aligned to 64 bytes. The
// caller has checked the shapes and `order`.
BELLE_API void belle_pack(const PackedWordsStruct* words, uint8_t* out, int threads, int isa) {
  const PackedWordsStruct& w = *words;
  const belle::IsaKernels* kernels = belle::kernels_for(isa);
  const int64_t strips = (w.outputs + belle::kPackedOutputs - 1) / belle::kPackedOutputs;
  const int64_t unit = belle::pieces_per_huge_page(w.groups * w.run * w.container / 8 * belle::kPackedOutputs);
  belle::parallel_for(threads, strips, unit, [&](int64_t strip, int64_t end, int) {
    for (; strip < end; ++strip) kernels->pack(w, strip, out);
  });
}
