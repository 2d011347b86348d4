#include "avx512vnni.h"

const belle::Kernel belle::kAvx512Vnni = belle::kTable;
