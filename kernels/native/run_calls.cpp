// The entry point of products, attention, norms and activation functions: makes one call, or all those of a recorded
// decode step. Products read megabytes each, so that after one the data of a call from Python comes from memory again.
#include "native.h"

#include <chrono>

namespace {

using Clock = std::chrono::steady_clock;

int run_call(const CallStruct& call, int threads, int isa) {
  switch (call.kind) {
    case kProduct: return belle::run_product(call, threads, isa);
    case kAttention: return belle::run_attention(*static_cast<const AttentionStruct*>(call.operand), threads, isa);
    default: return belle::run_elementwise(call, threads, isa);
  }
}

}  // namespace

// Return 0, or the status of the first call that failed: 1 if an index is out of bounds, 2 if memory is exhausted. Each
// call adds its time to seconds[kind], unless `seconds` is null.
BELLE_API int belle_run(const CallStruct* calls, int64_t count, int threads, int isa, double* seconds) {
  Clock::time_point start;
  for (const CallStruct* call = calls; call < calls + count; ++call) {
    if (seconds != nullptr) start = Clock::now();
    if (const int status = run_call(*call, threads, isa)) return status;
    if (seconds != nullptr) seconds[call->kind] += std::chrono::duration<double>(Clock::now() - start).count();
  }
  return 0;
}
