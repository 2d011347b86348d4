// AVX-512 F and BW without VNNI: products of words of 16 bits.
#include "registers_avx512.h"

namespace belle {
namespace {

struct Isa : Registers512 {
  static constexpr int kInputs = 2;
  static constexpr int kStreamRows = 4;
  static constexpr int kStreamPasses = 1;
  static inline Int dot(Int sum, Int code, int32_t x) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(code, _mm512_set1_epi32(x)));
  }
};

}  // namespace
}  // namespace belle

#include "kernel_table.h"

const belle::IsaKernels belle::kAvx512 = belle::kKernels;
