// The entry points of quantizing: some outputs at a time are a unit of work, which one thread does whole.
#include "native.h"

#include <atomic>

namespace {

template <class Work>
struct Plan {
  const Work& work;
  int64_t units;
  std::atomic<int64_t> next{0};
};

template <class Work>
void run_units(void* context) {
  Plan<Work>& plan = *static_cast<Plan<Work>*>(context);
  for (int64_t unit; (unit = plan.next++) < plan.units;) plan.work(unit);
}

// work(0), work(1), ... work(units - 1), on as many threads as there are units at most.
template <class Work>
void share(int threads, int64_t units, const Work& work) {
  Plan<Work> plan{work, units, {}};
  belle::parallel(units < threads ? static_cast<int>(units) : threads, run_units<Work>, &plan);
}

template <class Call>
void share_outputs(int threads, int64_t outputs, const Call& call) {
  share(threads, (outputs + belle::kSolved - 1) / belle::kSolved, [&](int64_t unit) {
    const int64_t n = unit * belle::kSolved, left = outputs - n;
    call(n, left < belle::kSolved ? left : belle::kSolved);
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
  share(threads, search->outputs / belle::kBlock, [&](int64_t unit) { kernel->search(*search, unit * belle::kBlock); });
}
