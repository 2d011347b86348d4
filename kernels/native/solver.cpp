// The entry points of the solver: a unit of work is a number of outputs. The caller has checked all shapes.
#include "native.h"

namespace {

// Call call(n, count) for at most kSolverOutputs outputs at a time.
template <class Call>
void share_outputs(int threads, int64_t outputs, const Call& call) {
  constexpr int kOutputs = belle::kSolverOutputs;
  belle::parallel_for(threads, outputs, kOutputs, [&](int64_t n, int64_t end, int) {
    for (; n < end; n += kOutputs) call(n, end - n < kOutputs ? end - n : kOutputs);
  });
}

}  // namespace

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
