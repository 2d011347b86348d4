// The entry points of quantizing: some outputs at a time are a unit of work, which one thread does whole.
#include "native.h"

namespace {

// call(n, count) for at most kSolverOutputs of the outputs at a time.
template <class Call>
void share_outputs(int threads, int64_t outputs, const Call& call) {
  belle::parallel_for(threads, outputs, belle::kSolverOutputs, [&](int64_t n, int64_t end, int) {
    for (; n < end; n += belle::kSolverOutputs) call(n, end - n < belle::kSolverOutputs ? end - n : belle::kSolverOutputs);
  });
}

}  // namespace

// The caller has checked all shapes.

BELLE_API void belle_gptq_block(const GptqBlockStruct* block, int threads, int isa) {
  const belle::IsaKernels* kernels = belle::kernels_for(isa);
  share_outputs(threads, block->outputs, [&](int64_t n, int64_t count) { kernels->gptq_block(*block, n, count); });
}

BELLE_API void belle_descend(const CoordinateDescentStruct* descent, int threads, int isa) {
  const belle::IsaKernels* kernels = belle::kernels_for(isa);
  share_outputs(threads, descent->outputs, [&](int64_t n, int64_t count) { kernels->descend(*descent, n, count); });
}

BELLE_API void belle_search(const GridSearchStruct* search, int threads, int isa) {
  const belle::IsaKernels* kernels = belle::kernels_for(isa);
  belle::parallel_for(threads, search->outputs, belle::kBlock, [&](int64_t n, int64_t end, int) {
    for (; n < end; n += belle::kBlock) kernels->search(*search, n);
  });
}
