// AVX-VNNI: Intel's desktop processors since 2021, which have no AVX-512.
#include "registers_avx2.h"

namespace belle {
namespace {

struct Isa : Registers256 {
  static constexpr int kInputs = 4;
  static inline Int dot(Int sum, Int code, int32_t x) {
    return _mm256_dpbusd_avx_epi32(sum, code, _mm256_set1_epi32(x));
  }
};

}  // namespace
}  // namespace belle

#include "kernel_table.h"

const belle::IsaKernels belle::kAvxVnni = belle::kKernels;
