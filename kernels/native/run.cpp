// The entry point of a model's parts: one call, or those of a whole step, recorded before. Between products that read
// megabytes each, every call from Python comes from memory anew and takes 20 microseconds or more.
#include "native.h"

// 0, or what the first call that failed returned: 1 where an index is out of bounds, 2 without memory.
BELLE_API int belle_run(const BelleCall* calls, int64_t count, int threads, int isa) {
  for (const BelleCall* call = calls; call < calls + count; ++call) {
    int outcome = 0;
    switch (call->kind) {
      case kProduct: outcome = belle::product(*call, threads, isa); break;
      case kAttention: outcome = belle::attend(*static_cast<const BelleAttention*>(call->subject), threads, isa); break;
      default: belle::rowwise(*call, threads, isa);
    }
    if (outcome != 0) return outcome;
  }
  return 0;
}
