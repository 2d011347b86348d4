// AVX-VNNI: Intel's desktop processors since 2021, which have no AVX-512.
#include "registers_avx2.h"

namespace belle {
namespace {

struct Isa : Registers256 {
  static constexpr int kInputs = 4;
  // In assembly, because gcc 12 copies the sum to another register before and after the intrinsic.
  static inline Int dot(Int sum, Int code, int32_t x) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(code), "x"(_mm256_set1_epi32(x)));
    return sum;
  }
};

}  // namespace
}  // namespace belle

#include "kernel_table.h"

const belle::IsaKernels belle::kAvxVnni = belle::kKernels;
