// Everything that one instruction set does. A file isa_*.cpp defines `struct Isa` and includes this last.
#include "tile.h"

#include "attend.h"
#include "gates.h"
#include "gptq.h"
#include "packing.h"
#include "rounding.h"

namespace belle {
namespace {

constexpr Kernel kTable{4 / Isa::kInputs, 0, split, multiply, read, attend_head, silu_and_mul, gelu, pack_strip,
                        round_row, gptq_block, descend, search};

}  // namespace
}  // namespace belle
