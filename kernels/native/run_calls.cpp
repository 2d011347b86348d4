// The entry point of a model's parts: one call, or those of a whole step, recorded before. Between products that read
// megabytes each, whatever a call from Python touches comes from memory anew.
#include "native.h"

#include <chrono>

namespace {

using Clock = std::chrono::steady_clock;

int run_one(const CallStruct& call, int threads, int isa) {
  switch (call.kind) {
    case kProduct: return belle::run_product(call, threads, isa);
    case kAttention: return belle::run_attention(*static_cast<const AttentionStruct*>(call.operand), threads, isa);
    default: return belle::run_elementwise(call, threads, isa);
  }
}

}  // namespace

// 0, or what the first call that failed returned: 1 where an index is out of bounds, 2 without memory. Where `seconds` is
// not null, each call adds its time to that of its kind.
BELLE_API int belle_run(const CallStruct* calls, int64_t count, int threads, int isa, double* seconds) {
  Clock::time_point began;
  for (const CallStruct* call = calls; call < calls + count; ++call) {
    if (seconds != nullptr) began = Clock::now();
    if (const int outcome = run_one(*call, threads, isa)) return outcome;
    if (seconds != nullptr) seconds[call->kind] += std::chrono::duration<double>(Clock::now() - began).count();
  }
  return 0;
}
