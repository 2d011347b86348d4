#include "avx512vnni.h"

const belle::Kernel belle::kAvx512Vnni = {1, split, multiply, read};
