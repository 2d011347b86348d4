// AVX-512 VNNI: four products of bytes per lane in one instruction.
#include "registers_avx512.h"

namespace belle {
namespace {

struct Isa : Registers512 {
  static constexpr int kInputs = 4;
  static inline Int dot(Int sum, Int code, int32_t x) {
    return _mm512_dpbusd_epi32(sum, code, _mm512_set1_epi32(x));
  }
};

}  // namespace
}  // namespace belle

#include "kernel_table.h"
