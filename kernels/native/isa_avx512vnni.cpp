#include "isa_avx512vnni.h"

const belle::IsaKernels belle::kAvx512Vnni = belle::kKernels;
