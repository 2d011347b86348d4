// Which instruction sets this processor and its operating system offer.
#pragma once

namespace belle {

enum InstructionSet { kIsaPortable, kIsaAvx2, kIsaAvxVnni, kIsaAvx512, kIsaAvx512Vnni, kIsaAmx, kIsaCount };

bool supported(int isa);

}  // namespace belle
