// The entry points of quantizing: some outputs at a time are a unit of work, which one thread does whole.
#include "native.h"

namespace {

// call(n, count) for at most kSolved of the outputs at a time.
template <class Call>
void share_outputs(int threads, int64_t outputs, const Call& call) {
  belle::share(threads, outputs, belle::kSolved, [&](int64_t n, int64_t end, int) {
    for (; n < end; n += belle::kSolved) call(n, end - n < belle::kSolved ? end - n : belle::kSolved);
  });
}

}  // namespace

// The caller has checked all shapes.

BELLE_API void belle_gptq_block(const BelleGptqBlock* block, int threads, int isa) {
  const belle::Kernel* kernel = belle::kernel(isa);
  share_outputs(threads, block->outputs, [&](int64_t n, int64_t count) { kernel->gptq_block(*block, n, count); });
}

BELLE_API void belle_descend(const BelleDescent* descent, int threads, int isa) {
  const belle::Kernel* kernel = belle::kernel(isa);
  share_outputs(threads, descent->outputs, [&](int64_t n, int64_t count) { kernel->descend(*descent, n, count); });
}

BELLE_API void belle_search(const BelleSearch* search, int threads, int isa) {
  const belle::Kernel* kernel = belle::kernel(isa);
  belle::share(threads, search->outputs, belle::kBlock, [&](int64_t n, int64_t end, int) {
    for (; n < end; n += belle::kBlock) kernel->search(*search, n);
  });
}
