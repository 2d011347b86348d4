// AVX2 and FMA: products of words of 16 bits. `vpmaddubsw` would saturate with codes of 8 bits, and needs as many
// instructions for two parts of 8 bits as `vpmaddwd` needs for one of 16.
#include "registers_avx2.h"

namespace belle {
namespace {

struct Isa : Registers256 {
  static constexpr int kInputs = 2;
  static inline Int dot(Int sum, Int code, int32_t x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(code, _mm256_set1_epi32(x)));
  }
};

}  // namespace
}  // namespace belle

#include "kernel_table.h"

const belle::IsaKernels belle::kAvx2 = belle::kKernels;
