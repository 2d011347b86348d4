#include "avx512vnni.h"

const belle::Kernel belle::kAvx512Vnni = {1, 0, split, multiply, read, attend, pack_strip, round_row,
    gptq_block, descend, search};
