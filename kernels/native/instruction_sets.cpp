// How the kernels of an instruction set are chosen: what the processor supports, and what the build contains.
#include "native.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// Bit i: the build contains instruction set i. setup.py omits those whose flags the compiler does not know.
#ifndef BELLE_ISAS
#define BELLE_ISAS 1
#endif

namespace belle {
namespace {

#if defined(__x86_64__)

struct Leaf {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Leaf cpuid(uint32_t leaf, uint32_t subleaf) {
  Leaf r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);  // keeps the zeros where there is no such leaf
  return r;
}

// Register state that the operating system saves: bits 1..2 AVX, 5..7 AVX-512, 17..18 tiles.
uint32_t saved_state() {
  if (!(cpuid(1, 0).c >> 27 & 1)) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool has(uint32_t state, uint32_t mask) { return (state & mask) == mask; }

bool supported(int isa) {
  const Leaf one = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
  const uint32_t state = saved_state();
  const bool avx2 = has(state, 0x6) && (seven.b >> 5 & 1) && (one.c >> 12 & 1) && (one.c >> 29 & 1);  // FMA, F16C
  const bool avx512 = avx2 && has(state, 0xE6) && has(seven.b, 1u << 16 | 1u << 30);  // F, BW
  const bool vnni = avx512 && (seven.c >> 11 & 1);
  switch (isa) {
    case kIsaPortable: return true;
    case kIsaAvx2: return avx2;
    case kIsaAvxVnni: return avx2 && (more.a >> 4 & 1);
    case kIsaAvx512: return avx512;
    case kIsaAvx512Vnni: return vnni;
    case kIsaAmx: return vnni && has(state, 0x60000) && has(seven.d, 1u << 24 | 1u << 25);  // tiles, int8
    default: return false;
  }
}

#else

bool supported(int isa) { return isa == kIsaPortable; }

#endif

constexpr unsigned kBuilt = BELLE_ISAS;

bool usable(int isa) {
#if BELLE_ISAS & 32
  if (isa == kIsaAmx) return supported(isa) && amx_usable();
#endif
  return (kBuilt >> isa & 1) && supported(isa);
}

}  // namespace

const IsaKernels* kernels_for(int isa) {
  switch (isa) {
#if BELLE_ISAS & 2
    case kIsaAvx2: return &kAvx2;
#endif
#if BELLE_ISAS & 4
    case kIsaAvxVnni: return &kAvxVnni;
#endif
#if BELLE_ISAS & 8
    case kIsaAvx512: return &kAvx512;
#endif
#if BELLE_ISAS & 16
    case kIsaAvx512Vnni: return &kAvx512Vnni;
#endif
#if BELLE_ISAS & 32
    case kIsaAmx: return &kAmx;
#endif
    default: return &kPortable;
  }
}

}  // namespace belle

// Return 1 if instruction set `isa` (an `InstructionSet`) is in the build and works on this machine, else 0.
BELLE_API int belle_usable(int isa) { return isa >= 0 && isa < belle::kIsaCount && belle::usable(isa); }
