// The table of all kernels of one instruction set. A file isa_*.cpp defines `struct Isa` and includes this last.
#include "matmul.h"

#include "activation_functions.h"
#include "attention.h"
#include "packing.h"
#include "row_quantization.h"
#include "solver.h"

namespace belle {
namespace {

constexpr IsaKernels kKernels{4 / Isa::kInputs, Isa::kStreamPasses * Isa::kStreamRows, 0, split, multiply, read, attend_head, silu_and_mul, gelu, pack_strip,
                              quantize_row, gptq_block, descend, search};

}  // namespace
}  // namespace belle
